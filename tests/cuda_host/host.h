// Runs a kernel of pmpd/kernels/cuda on a CPU, thread by thread: the source as it is, with the machine's
// instructions done in plain C++ by their definition in the PTX manual. The threads of a block are fibers;
// what needs a whole warp or block waits for it. More is checked than a GPU would: every access to global
// memory lies in a buffer and is of its kind; nothing that an earlier kernel writes is read before
// `wait_for_last`, and nothing is written; all lanes of a warp meet at the same instruction. Copies land as
// early or as late as is allowed, and threads run in several orders: results must not depend on either. The
// blocks of a cluster run together, each with shared memory of its own.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#define PMPD_INSTRUCTIONS
#define DEVICE inline
#define KERNEL(THREADS, BLOCKS) void
#define SHARED alignas(16) static
#define UNROLL
#define NO_UNROLL

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };

namespace host {
enum Kind { CONSTANT, WRITTEN, RESULT };
struct Range { const char* begin; size_t bytes; Kind kind; };
struct Copy { unsigned to; const char* from; };
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool started, done;
    bool waited, arrived;  // for the kernel in front; at the cluster's barrier
    int phase;
    std::vector<std::vector<Copy>> groups;
};
enum Op { NONE, SYNC, SHUFFLE, MAXIMUM, SUM, MMA, MMA_HALVES };
struct Warp {
    Op op;
    int arrived, turn;
    unsigned a[32][4], b[32][2];
    int d[32][4];
    float value[32], result[32], products[32][4];
};
struct Block {
    char* arena;  // its dynamic shared memory, 16-byte aligned
    int arrived, turn;
    int team_arrived[16], team_turn[16];
};

inline std::vector<Range> ranges;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline std::vector<Block> cluster;  // that runs now
inline std::vector<char> shared;    // the dynamic part of each, and guards
inline size_t shared_bytes;
inline ucontext_t scheduler;
inline int current, first_block, blocks, threads, cluster_arrived, cluster_turn;
inline bool late;

inline std::string problem;  // the first one; it ends the launch
constexpr size_t GUARD = 4096;

inline int rank() { return current / threads; }  // of the block in its cluster
inline char* arena() { return cluster[rank()].arena; }
inline void yield() { swapcontext(&fibers[current].context, &scheduler); }
[[noreturn]] inline void fail(const char* what, const void* where = nullptr) {
    char text[200];
    std::snprintf(text, sizeof text, "block %d, thread %d: %s %p", first_block + rank(),
                  current % threads, what, where);
    if (problem.empty()) problem = text;
    while (true) yield();  // never resumed
}

// Whether an access is of the memory of a kind; with no memory told of, all are.
inline bool is_of(Kind kind, const void* p, size_t bytes) {
    const char* at = static_cast<const char*>(p);
    if (reinterpret_cast<uintptr_t>(at) % bytes) fail("a misaligned access at", p);
    for (const Range& r : ranges)
        if (at >= r.begin && at + bytes <= r.begin + r.bytes) return r.kind == kind;
    if (!ranges.empty()) fail("an access outside all buffers at", p);
    return true;
}

// All 32 lanes meet; the last one does `work`.
template <class Work> void together(Op op, Work work) {
    Warp& warp = warps[current / 32];
    if (warp.arrived && warp.op != op) fail("lanes of a warp are at different instructions");
    warp.op = op;
    const int turn = warp.turn;
    if (++warp.arrived == 32) {
        work(warp);
        warp.arrived = 0, warp.turn++;
    } else {
        while (warp.turn == turn) yield();
    }
}
}  // namespace host

inline int thread_index() { return host::current % host::threads; }
inline int block_index() { return host::first_block + host::rank(); }
inline int block_count() { return host::blocks; }
inline uint4* dynamic_shared() { return reinterpret_cast<uint4*>(host::arena()); }
inline void sync_warp() { host::together(host::SYNC, [](host::Warp&) {}); }
inline void sync_block() {
    host::Block& block = host::cluster[host::rank()];
    const int turn = block.turn;
    if (++block.arrived == host::threads) {
        block.arrived = 0, block.turn++;
    } else {
        while (block.turn == turn) host::yield();
    }
}
template <int TEAMS, int MEMBERS> void sync_team(int team) {
    if (team < 0 || team >= TEAMS || TEAMS * MEMBERS * 32 != host::threads) host::fail("no such team");
    if (thread_index() / (MEMBERS * 32) != team) host::fail("in another team");
    host::Block& block = host::cluster[host::rank()];
    const int turn = block.team_turn[team];
    if (++block.team_arrived[team] == MEMBERS * 32) {
        block.team_arrived[team] = 0, block.team_turn[team]++;
    } else {
        while (block.team_turn[team] == turn) host::yield();
    }
}
inline void cluster_arrive() {
    host::Fiber& fiber = host::fibers[host::current];
    if (fiber.arrived) host::fail("arrived at the cluster's barrier twice");
    fiber.arrived = true, fiber.phase = host::cluster_turn;
    if (++host::cluster_arrived == int(host::fibers.size())) host::cluster_arrived = 0, host::cluster_turn++;
}
inline void cluster_wait() {
    host::Fiber& fiber = host::fibers[host::current];
    if (!fiber.arrived) host::fail("waits for the cluster without having arrived");
    while (host::cluster_turn == fiber.phase) host::yield();
    fiber.arrived = false;
}
inline void store_in_cluster(float4* to, int rank, float4 value) {
    if (rank < 0 || rank >= int(host::cluster.size())) host::fail("no such block in the cluster");
    const size_t at = reinterpret_cast<char*>(to) - host::arena();
    if (at % 16 || at + 16 > host::shared_bytes) host::fail("a store to outside shared memory");
    bool runs = false;
    for (int i = 0; i < host::threads; i++) {
        const host::Fiber& other = host::fibers[rank * host::threads + i];
        if (!other.started) host::fail("a store to a block that may not have started");
        runs |= !other.done;
    }
    if (!runs) host::fail("a store to a block that has ended");
    std::memcpy(host::cluster[rank].arena + at, &value, 16);
}
inline void let_next_start() {}
inline void wait_for_last() { host::fibers[host::current].waited = true; }

template <class V> V load_constant(const V* from) {
    if (!host::is_of(host::CONSTANT, from, sizeof(V))) host::fail("not a constant:", from);
    return *from;
}
template <class V> V load_written(const V* from) {
    if (!host::is_of(host::WRITTEN, from, sizeof(V))) host::fail("not an input:", from);
    if (!host::fibers[host::current].waited) host::fail("read before wait_for_last:", from);
    return *from;
}
template <class V> void store(V* to, V value) {
    if (!host::is_of(host::RESULT, to, sizeof(V))) host::fail("not a result:", to);
    if (!host::fibers[host::current].waited) host::fail("written before wait_for_last:", to);
    *to = value;
}

inline unsigned shared_address(const void* p) {
    return unsigned(static_cast<const char*>(p) - host::arena());
}
inline void land(const host::Copy& copy) { std::memcpy(host::arena() + copy.to, copy.from, 16); }
inline void copy16(unsigned to, const void* from) {
    if (to % 16 || to + 16 > host::shared_bytes) host::fail("a copy to outside shared memory");
    if (!host::is_of(host::CONSTANT, from, 16)) host::fail("a copy of what is no constant", from);
    auto& groups = host::fibers[host::current].groups;
    if (groups.empty()) groups.emplace_back();
    groups.back().push_back({to, static_cast<const char*>(from)});
    if (host::late) std::memset(host::arena() + to, 0x5A, 16);
    else land(groups.back().back());
}
inline void copy16_or_zero(unsigned to, const void* from, bool copies) {
    static const char zeros[16] = {};
    if (to % 16 || to + 16 > host::shared_bytes) host::fail("a copy to outside shared memory");
    if (!host::fibers[host::current].waited) host::fail("read before wait_for_last:", from);
    if (copies && !host::is_of(host::WRITTEN, from, 16)) host::fail("not an input:", from);
    auto& groups = host::fibers[host::current].groups;
    if (groups.empty()) groups.emplace_back();
    groups.back().push_back({to, copies ? static_cast<const char*>(from) : zeros});
    if (host::late) std::memset(host::arena() + to, 0x5A, 16);
    else land(groups.back().back());
}
// The last group is the open one.
inline void close_group() {
    auto& groups = host::fibers[host::current].groups;
    if (groups.empty()) groups.emplace_back();
    groups.emplace_back();
}
inline void wait_pending(int n) {
    auto& groups = host::fibers[host::current].groups;
    if (n > 15) n = 15;
    while (int(groups.size()) - 1 > n) {
        if (host::late)
            for (const host::Copy& copy : groups.front()) land(copy);
        groups.erase(groups.begin());
    }
}

// Lane 4 g + t: a0, a1 rows g, g + 8 of columns 32 t .., a2, a3 the same of columns 128 + 32 t ..; b0, b1
// column g of rows 32 t .., 128 + 32 t ..; c0, c1 row g, columns 2 t, 2 t + 1; c2, c3 row g + 8.
inline void mma_bits_start(int (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    const int lane = host::current % 32;
    host::Warp& warp = host::warps[host::current / 32];
    std::memcpy(warp.a[lane], a, sizeof a);
    warp.b[lane][0] = b0, warp.b[lane][1] = b1;
    host::together(host::MMA, [](host::Warp& w) {
        for (int row = 0; row < 16; row++)
            for (int column = 0; column < 8; column++) {
                int sum = 0;
                for (int t = 0; t < 4; t++)
                    for (int h = 0; h < 2; h++)
                        sum += __builtin_popcount(w.a[row % 8 * 4 + t][2 * h + row / 8] &
                                                  w.b[column * 4 + t][h]);
                w.d[row % 8 * 4 + column / 2][row / 8 * 2 + column % 2] = sum;
            }
    });
    std::memcpy(c, warp.d[lane], sizeof c);
}
inline void mma_bits(int (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    int d[4];
    mma_bits_start(d, a, b0, b1);
    for (int i = 0; i < 4; i++) c[i] += d[i];
}

inline float shuffle_xor(float value, int mask) {
    const int lane = host::current % 32;
    host::Warp& warp = host::warps[host::current / 32];
    warp.value[lane] = value;
    host::together(host::SHUFFLE, [](host::Warp& w) { std::memcpy(w.result, w.value, sizeof w.value); });
    return warp.result[lane ^ mask];
}
// What all lanes get that bring `value`, of four bytes.
template <class V> V reduced(V value, host::Op kind, V (*join)(V, V)) {
    static V (*joining)(V, V);
    joining = join;
    const int lane = host::current % 32;
    host::Warp& warp = host::warps[host::current / 32];
    std::memcpy(&warp.value[lane], &value, 4);
    host::together(kind, [](host::Warp& w) {
        V all, next;
        std::memcpy(&all, &w.value[0], 4);
        for (int i = 1; i < 32; i++) std::memcpy(&next, &w.value[i], 4), all = joining(all, next);
        for (float& r : w.result) std::memcpy(&r, &all, 4);
    });
    std::memcpy(&value, &warp.result[lane], 4);
    return value;
}
inline unsigned warp_max(unsigned value) {
    return reduced<unsigned>(value, host::MAXIMUM, [](unsigned a, unsigned b) { return a > b ? a : b; });
}
inline int warp_sum(int value) {
    return reduced<int>(value, host::SUM, [](int a, int b) { return a + b; });
}
inline float reciprocal(float value) { return 1.0f / value; }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float reciprocal_root(float value) { return 1.0f / std::sqrt(value); }
inline float exponential(float value) { return std::exp(value); }
inline unsigned bits_of(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float float_of(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline unsigned larger_halves(unsigned a, unsigned b) {
    const unsigned low = (a & 0xFFFF) > (b & 0xFFFF) ? a : b, high = a >> 16 > b >> 16 ? a : b;
    return (low & 0xFFFF) | (high & 0xFFFF0000u);
}
inline unsigned prmt(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    unsigned d = 0;
    for (int i = 0; i < 4; i++) d |= unsigned(bytes >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
    return d;
}

#include "../../pmpd/kernels/cuda/instructions.cuh"

template <Type TYPE> float widen(u16 value) {
    if (TYPE == BFLOAT16) return float_of(unsigned(value) << 16);
    _Float16 half;
    std::memcpy(&half, &value, 2);
    return float(half);
}
template <Type TYPE> u16 narrow(float value) {
    u16 bits;
    if (TYPE == BFLOAT16) {
        const unsigned wide = bits_of(value);
        if (value != value) return 0x7FFF;
        return u16((wide + 0x7FFF + (wide >> 16 & 1)) >> 16);
    }
    const _Float16 half = static_cast<_Float16>(value);
    std::memcpy(&bits, &half, 2);
    return bits;
}
template <Type TYPE, class Join> unsigned of_halves(unsigned a, unsigned b, Join join) {
    return unsigned(narrow<TYPE>(join(widen<TYPE>(u16(a)), widen<TYPE>(u16(b))))) |
           unsigned(narrow<TYPE>(join(widen<TYPE>(u16(a >> 16)), widen<TYPE>(u16(b >> 16))))) << 16;
}
template <Type TYPE> unsigned add_halves(unsigned a, unsigned b) {
    return of_halves<TYPE>(a, b, [](float x, float y) { return x + y; });
}
template <Type TYPE> unsigned multiply_halves(unsigned a, unsigned b) {
    return of_halves<TYPE>(a, b, [](float x, float y) { return x * y; });
}

template <Type TYPE> float half_of(unsigned word, int upper) {
    return widen<TYPE>(u16(word >> (16 * upper)));
}
// Lane 4 g + t: a0, a1 rows g, g + 8 of columns 2 t, 2 t + 1, a2, a3 the same of columns 8 + 2 t ..; b0, b1
// column g of rows 2 t .., 8 + 2 t ..; c as of `mma_bits`.
template <Type TYPE> void mma_halves(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    const int lane = host::current % 32;
    host::Warp& warp = host::warps[host::current / 32];
    std::memcpy(warp.a[lane], a, sizeof a);
    warp.b[lane][0] = b0, warp.b[lane][1] = b1;
    host::together(host::MMA_HALVES, [](host::Warp& w) {
        for (int row = 0; row < 16; row++)
            for (int column = 0; column < 8; column++) {
                double sum = 0;
                for (int k = 0; k < 16; k++)
                    sum += double(half_of<TYPE>(w.a[row % 8 * 4 + k / 2 % 4][k / 8 * 2 + row / 8], k % 2)) *
                           half_of<TYPE>(w.b[column * 4 + k / 2 % 4][k / 8], k % 2);
                w.products[row % 8 * 4 + column / 2][row / 8 * 2 + column % 2] = float(sum);
            }
    });
    for (int i = 0; i < 4; i++) c[i] += warp.products[lane][i];
}
inline unsigned look_up(unsigned a, unsigned b, unsigned selector) {
    if (selector & 0x8888) host::fail("a selector above 7");
    return prmt(a, b, selector);
}
inline unsigned pick(unsigned a, unsigned b, unsigned mask) { return (a & mask) | (b & ~mask); }

namespace host {
inline void (*entry)();
inline void fiber_main() {
    fibers[current].started = true;
    entry();
    fibers[current].done = true;
    yield();
}
// One cluster of `size` blocks after the other; `order` 0: threads upwards, 1: downwards, 2: every seventh,
// around, 3: each warp as far as it comes alone.
inline void run(void (*body)(), int of_block, int grid, size_t bytes, int order, bool late_copies, int size) {
    const int all = of_block * size;
    entry = body, blocks = grid, late = late_copies, shared_bytes = bytes, threads = of_block;
    problem.clear();
    fibers.resize(all), warps.resize(all / 32), cluster.resize(size);
    const size_t room = (bytes + 15) / 16 * 16 + GUARD;
    for (Fiber& f : fibers) f.stack.resize(256 << 10);
    for (first_block = 0; first_block < grid; first_block += size) {
        shared.assign(size * room + 16, char(0xA5));
        char* const aligned = shared.data() + (16 - reinterpret_cast<uintptr_t>(shared.data()) % 16) % 16;
        for (int i = 0; i < size; i++) cluster[i] = {aligned + i * room, 0, 0};
        cluster_arrived = cluster_turn = 0;
        for (Warp& w : warps) w = Warp{};
        for (Fiber& f : fibers) {
            f.started = f.done = f.waited = f.arrived = false;
            f.groups.clear();
            getcontext(&f.context);
            f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = f.stack.size();
            f.context.uc_link = &scheduler;
            makecontext(&f.context, fiber_main, 0);
        }
        int arrivals = -1, left = all;
        for (long idle = 0; left;) {
            left = 0;
            for (int i = 0, swept = 0; i < all; i++) {
                current = order == 1 ? all - 1 - i : order == 2 ? (i * 7 + first_block) % all : i;
                if (i % 32 == 0) swept = warps[i / 32].turn;
                if (!fibers[current].done) {
                    swapcontext(&scheduler, &fibers[current].context);
                    if (!problem.empty()) return;
                    left += !fibers[current].done;
                }
                // order 3: the warp again, until it waits for others
                if (order == 3 && i % 32 == 31 && warps[i / 32].turn != swept) i -= 32;
            }
            int now = cluster_turn;
            for (const Block& b : cluster) {
                now += b.turn;
                for (int turn : b.team_turn) now += turn;
            }
            for (const Warp& w : warps) now += w.turn;
            idle = now == arrivals ? idle + 1 : 0, arrivals = now;
            if (idle > 3 && left) problem = "the block hangs: threads wait for others that never come";
            if (!problem.empty()) return;
        }
        for (const Fiber& f : fibers)
            if (f.arrived) problem = "a thread ended between its arrival and its wait";
        for (const Block& b : cluster)
            if (b.arrived) problem = "some threads wait for a barrier that others never reach";
        for (const Block& b : cluster)
            for (int arrived : b.team_arrived)
                if (arrived) problem = "some threads wait for a team that others never reach";
        for (Warp& w : warps)
            if (w.arrived) problem = "some lanes wait for others that have ended";
        for (const Block& b : cluster)
            for (const char* p = b.arena + (bytes + 15) / 16 * 16; p < b.arena + room; p++)
                if (*p != char(0xA5)) problem = "a write past the end of shared memory";
        if (!problem.empty()) return;
    }
}
}  // namespace host
