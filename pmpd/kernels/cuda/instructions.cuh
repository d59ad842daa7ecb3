// The machine's own instructions that the kernels here need, each with a name. No header of the CUDA
// toolkit is used, so NVRTC needs no include path. A host program that defines PMPD_INSTRUCTIONS puts its
// own in their place (tests/cuda_host).
#pragma once
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;

enum Type { FLOAT16, BFLOAT16 };

#ifndef PMPD_INSTRUCTIONS
#define DEVICE __device__ __forceinline__
#define KERNEL(THREADS, BLOCKS) __global__ void __launch_bounds__(THREADS, BLOCKS)
#define SHARED __shared__
#define UNROLL _Pragma("unroll")
#define NO_UNROLL _Pragma("unroll 1")

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_index() { return blockIdx.x; }
DEVICE int block_count() { return gridDim.x; }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_block() { __syncthreads(); }
// Team `team` of a block of TEAMS, MEMBERS warps each, in the order of the warps.
template <int TEAMS, int MEMBERS> DEVICE void sync_team(int team) {
    if (MEMBERS == 1) sync_warp();
    else if (TEAMS == 1) sync_block();
    else asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(MEMBERS * 32) : "memory");
}
DEVICE uint4* dynamic_shared() {
    extern __shared__ uint4 dynamic_room[];
    return dynamic_room;
}

// Programmatic dependent launch (sm_90): the next kernel may start; this one waits until the one in front
// has ended and its writes are seen. Before `wait_for_last` a kernel reads only what no kernel writes, and
// writes nothing.
DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void wait_for_last() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Weights and tables (nobody writes them); what an earlier kernel wrote; a result.
template <class V> DEVICE V load_constant(const V* from) { return __ldg(from); }
template <class V> DEVICE V load_written(const V* from) { return __ldcg(from); }
template <class V> DEVICE void store(V* to, V value) { *to = value; }

DEVICE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory without passing registers, in groups that are waited for in order.
DEVICE void copy16(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// The same, or 16 zero bytes.
DEVICE void copy16_or_zero(u32 to, const void* from, bool copies) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(copies ? 16 : 0)
                 : "memory");
}
DEVICE void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> DEVICE void wait_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
// Until at most n groups are pending; n is a constant after unrolling; above 15, waits for a few more.
DEVICE void wait_pending(int n) {
    switch (n) {
        case 0: wait_groups<0>(); break;
        case 1: wait_groups<1>(); break;
        case 2: wait_groups<2>(); break;
        case 3: wait_groups<3>(); break;
        case 4: wait_groups<4>(); break;
        case 5: wait_groups<5>(); break;
        case 6: wait_groups<6>(); break;
        case 7: wait_groups<7>(); break;
        case 8: wait_groups<8>(); break;
        case 9: wait_groups<9>(); break;
        case 10: wait_groups<10>(); break;
        case 11: wait_groups<11>(); break;
        case 12: wait_groups<12>(); break;
        case 13: wait_groups<13>(); break;
        case 14: wait_groups<14>(); break;
        default: wait_groups<15>(); break;
    }
}

// c = a b, or c += a b: 16 x 256 bits times 256 x 8 bits, int32 counts of the common ones.
DEVICE void mma_bits_start(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
                 : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(0));
}
DEVICE void mma_bits(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c += a b: 16 x 16 times 16 x 8 floats of 16 bits, sums of 32.
template <Type TYPE> DEVICE void mma_halves(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if (TYPE == BFLOAT16)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                     "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                     "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A cluster is consecutive blocks that run at once. What a thread wrote before it arrives, every thread of
// the cluster sees behind its wait. Slow: arriving waits for all that the thread has written and asked for.
DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// To where `to` of this block's shared memory is in block `rank` of the cluster.
DEVICE void store_in_cluster(float4* to, int rank, float4 value) {
#if __CUDA_ARCH__ >= 900
    u32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(to)), "r"(rank));
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(there), "f"(value.x), "f"(value.y),
                 "f"(value.z), "f"(value.w)
                 : "memory");
#endif
}

DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffff, value, mask); }
DEVICE u32 warp_max(u32 value) { return __reduce_max_sync(0xffffffff, value); }
DEVICE int warp_sum(int value) { return __reduce_add_sync(0xffffffff, value); }
// 1 / value, rounded to the nearest; neither value nor the result below 2^-126.
DEVICE float reciprocal(float value) {
    float near;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(near) : "f"(value));
    return __fmaf_rn(near, __fmaf_rn(-value, near, 1.0f), near);
}
DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float reciprocal_root(float value) { return rsqrtf(value); }
DEVICE float exponential(float value) { return __expf(value); }
DEVICE u32 bits_of(float value) { return __float_as_uint(value); }
DEVICE float float_of(u32 bits) { return __uint_as_float(bits); }
// The larger of the two low halves, and of the two high ones, as numbers without sign.
DEVICE u32 larger_halves(u32 a, u32 b) {
#if __CUDA_ARCH__ >= 900
    u32 larger;
    asm("max.u16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
    return larger;
#else
    return __vmaxu2(a, b);
#endif
}
DEVICE u32 prmt(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }
// Byte i is byte `nibble i of selector` (each below 8) of the eight of b:a.
DEVICE u32 look_up(u32 a, u32 b, u32 selector) {
    u32 found;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(found) : "r"(a), "r"(b), "r"(selector));
    return found;
}
// Bits of a where the mask is set, else of b.
DEVICE u32 pick(u32 a, u32 b, u32 mask) {
    u32 found;
    asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(found) : "r"(a), "r"(b), "r"(mask));
    return found;
}

template <Type TYPE> DEVICE float widen(u16 value) {
    if (TYPE == BFLOAT16) return __uint_as_float(u32(value) << 16);
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value));
    return wide;
}
template <Type TYPE> DEVICE u16 narrow(float value) {  // to the nearest, ties to even
    u16 bits;
    if (TYPE == BFLOAT16) asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    else asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
// What `join` makes of the low halves and of the high ones as floats, each rounded once.
template <Type TYPE, class Join> DEVICE u32 of_halves(u32 a, u32 b, Join join) {
    return u32(narrow<TYPE>(join(widen<TYPE>(u16(a)), widen<TYPE>(u16(b))))) |
           u32(narrow<TYPE>(join(widen<TYPE>(u16(a >> 16)), widen<TYPE>(u16(b >> 16))))) << 16;
}
// Sums and products of the low halves and of the high ones.
template <Type TYPE> DEVICE u32 add_halves(u32 a, u32 b) {
    u32 sum;
    if (TYPE == FLOAT16) {
        asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
        return sum;
    }
#if __CUDA_ARCH__ >= 900
    asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
    return sum;
#else
    return of_halves<TYPE>(a, b, [](float x, float y) { return x + y; });
#endif
}
template <Type TYPE> DEVICE u32 multiply_halves(u32 a, u32 b) {
    u32 product;
    if (TYPE == FLOAT16) {
        asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
        return product;
    }
#if __CUDA_ARCH__ >= 900
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
#else
    return of_halves<TYPE>(a, b, [](float x, float y) { return x * y; });
#endif
}
#endif
