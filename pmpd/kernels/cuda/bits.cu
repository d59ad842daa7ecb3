// y = x W' + bias for one or two tokens on the 1-bit tensor cores (sm_80 to sm_90): no weight is ever
// decoded.
//
// A table of 2^b values is a polynomial in the b bits of the code: T[c] = sum over subsets S of planes of
// t_S * prod_{p in S} bit_p(c), t the Moebius transform of T (float32, made at load; bit p of a subset's
// index is plane p). So y = t_0 sum(x) + sum_S t_S sum_k x_k [all bits of S are set in code k]. Activations
// are 16-bit fixed point, a scale for each warp's columns; bit j of the numbers is column j of the operand
// B, so one m16n8k256 multiplies 16 rows x 256 columns of one subset with eight bits of every activation,
// exactly. A subset costs one `and` for 32 weights.
//
// A tile is 16 rows x 256 columns, a row block the TILES tiles of 16 rows. Planes are as `matrix.py` lays
// them out: lane 4 g + t, word 2 h + r of a tile holds row 8 r + g, columns 128 h + 32 s + 8 t + i (s 0..3,
// i 0..7) at bit 4 i + 3 - s, in every plane alike.
//
// SPLITS warps, a team, share the columns of a row block: warp s of a team takes tiles s, s + SPLITS, ...,
// T of them. A block has TEAMS = WARPS / SPLITS teams, which never wait for each other once the activations
// are there. Teams are persistent: team q of all takes row blocks q, q + teams, ... With as many teams as
// row blocks each warp streams through one, and what comes behind the products is paid once.
//
// A warp has a ring of SLOTS <= T tiles that cp.async fills across row blocks, half of it before waiting for
// the kernel in front. Every lane reads back only what it copied itself, so the ring needs no
// barrier; the one barrier of a row block is that of its team, which adds the warps' sums.
//
// A pass is the subsets with one set of the planes behind the third: 2^(BITS - 3) passes, eight subsets of
// the first three planes each, for every token. LIVE passes keep their sums at once: all of them, and a
// tile is read once; or one, and the passes of CHUNK tiles, which lie in the ring together, follow each
// other.
#include "instructions.cuh"

enum Front { PLAIN, NORM };    // what is done with x first: nothing; RMS norm of x + delta
enum Back { STORE, GATED };    // what is done with the sum: nothing; silu(gate) * up

struct Arguments {
    const uint4* planes;           // [P, N/16, K/256, 32]
    const float* coefficients;     // [N padded, 2^BITS]
    const float* coefficients1;    // [N padded, 2^BITS1]: the second token's, where it has other bits
    const u16* bias;               // [N], or null
    const u16* x;                  // [M, K], rows x_stride apart; NORM: the residual
    const u16* delta;              // NORM: [M, K] that is added to it, or null
    const u16* weight;             // NORM: [K]
    u16* residual;                 // NORM: [M, K] <- x + delta, another buffer than x
    u16* y;                        // [M, N]; GATED: [M, N / 2]
    i64 plane_stride;              // in uint4
    i64 x_stride, delta_stride, residual_stride, y_stride;  // in elements, x's a multiple of 8
    float epsilon;                 // NORM
    int rows, columns;             // N, K
    int row_blocks;                // N / 16; GATED: of gate, and as many of up behind them
};

// The 8 x 8 bits of high:low (byte r, bit c) across their diagonal.
DEVICE void transpose(u32& low, u32& high) {
    u32 t = (low ^ (low >> 7)) & 0x00AA00AA;
    low ^= t ^ (t << 7);
    t = (high ^ (high >> 7)) & 0x00AA00AA;
    high ^= t ^ (t << 7);
    t = (low ^ (low >> 14)) & 0x0000CCCC;
    low ^= t ^ (t << 14);
    t = (high ^ (high >> 14)) & 0x0000CCCC;
    high ^= t ^ (t << 14);
    t = (low ^ (high << 4)) & 0xF0F0F0F0;
    low ^= t, high ^= t >> 4;
}

DEVICE u32& word(uint4& v, int i) { return reinterpret_cast<u32*>(&v)[i]; }

// Value i of eight.
template <Type TYPE> DEVICE float value_of(uint4& v, int i) {
    return widen<TYPE>(u16(word(v, i / 2) >> (i % 2 * 16)));
}
template <Type TYPE> DEVICE u32 both(float low, float high) {
    return u32(narrow<TYPE>(low)) | u32(narrow<TYPE>(high)) << 16;
}

// Whole numbers in floats without the converter, which is slow: added to the bits of 1.5 * 2^23 they are the
// bits of a float that many larger, if they lie in -2^22 .. 2^22.
constexpr u32 WHOLE_BITS = 0x4B400000;
constexpr float WHOLE = 12582912.0f;
DEVICE float whole(int bits) { return float_of(u32(bits)) - WHOLE; }

template <int TOKENS, int WARPS> struct Room {  // shared memory besides what is dynamic
    float sums[2][TOKENS][WARPS][16];
    float squares[TOKENS][WARPS];
    u32 largest[TOKENS][WARPS];  // bits of a float that is not negative: ordered like it
    float part[TOKENS][WARPS];  // sum of each warp's represented activations
};

// Activations of T tiles of a warp, eight a lane, -> the tiles' 512 bytes each (that of warp w's tile i is
// i * WARPS + w). Returns the bits of the largest absolute value of the warp, as a float; NaN is larger than
// all others.
template <Type TYPE, int T, int WARPS> DEVICE u32 put(uint4 (&v)[T], uint4* tiles, int lane) {
    u32 largest = 0;  // of the even columns, and of the odd ones
    UNROLL for (int i = 0; i < T; i++) {
        UNROLL for (int c = 0; c < 4; c++) largest = larger_halves(largest, word(v[i], c) & 0x7FFF7FFF);
        tiles[i * WARPS * 32 + lane] = v[i];
    }
    largest = larger_halves(largest, largest >> 16);
    return warp_max(bits_of(widen<TYPE>(u16(largest))));
}

// What `put` left -> fixed point, its bits as operands of `mma_bits`, in the same place. Returns the sum of
// the fixed-point numbers.
template <Type TYPE, int T, int WARPS> DEVICE int split(uint4* tiles, int lane, float scale) {
    const float inverse = reciprocal(scale);
    u32 sum = 0;
    sync_warp();
    // A lane makes bits 8 m .. 8 m + 7 of word h of the lanes that have thread u in their group.
    const int h = lane / 16, u = lane / 4 % 4, m = lane % 4;
    UNROLL for (int i = 0; i < T; i++) {
        uint4* tile = tiles + i * WARPS * 32;
        const u32* from = reinterpret_cast<const u32*>(tile) + 64 * h + 4 * u + m;
        u32 fixed[8];
        UNROLL for (int c = 0; c < 4; c++) {
            const u32 two = from[16 * (3 - c)];
            UNROLL for (int odd = 0; odd < 2; odd++) {
                // the low 16 bits are the rounded number in two's complement
                const float value = widen<TYPE>(u16(two >> (16 * odd)));
                fixed[c + 4 * odd] = bits_of(multiply_add(value, inverse, WHOLE));
                sum += fixed[c + 4 * odd];
            }
        }
        sync_warp();
        u8* to = reinterpret_cast<u8*>(tile) + 16 * u + 4 * h + m;
        UNROLL for (int q = 0; q < 2; q++) {
            const u32 half = q ? 0x7632 : 0x5410;
            u32 low = prmt(prmt(fixed[0], fixed[1], 0x5140), prmt(fixed[2], fixed[3], 0x5140), half);
            u32 high = prmt(prmt(fixed[4], fixed[5], 0x5140), prmt(fixed[6], fixed[7], 0x5140), half);
            transpose(low, high);  // byte j: bit j of the eight values
            UNROLL for (int j = 0; j < 8; j++) to[64 * j + 8 * q] = u8((j < 4 ? low : high) >> (8 * (j % 4)));
        }
    }
    return warp_sum(int(sum - 8u * T * WHOLE_BITS));
}

// BITS of the first token, BITS1 <= BITS of the second (0: there is none).
template <Type TYPE, Front FRONT, Back BACK, int BITS, int BITS1, int TILES, int WARPS, int SPLITS, int SLOTS,
          int LIVE, int BLOCKS>
KERNEL(WARPS * 32, BLOCKS) bits_product(const Arguments a) {
    constexpr int TOKENS = BITS1 ? 2 : 1, TEAMS = WARPS / SPLITS;
    constexpr int T = (TILES + SPLITS - 1) / SPLITS, OWN = (TILES + WARPS - 1) / WARPS;
    constexpr bool RAGGED = TILES % SPLITS != 0;  // some warps have no last tile
    constexpr int PASSES = BITS > 3 ? 1 << (BITS - 3) : 1, PASSES1 = BITS1 > 3 ? 1 << (BITS1 - 3) : 1;
    constexpr int CHUNK = LIVE == PASSES ? T : SLOTS, EARLY = (SLOTS + 1) / 2;
    constexpr int TURN = LIVE == PASSES && T % SLOTS == 0 ? SLOTS : 1;  // tiles unrolled: once around
    constexpr int LOW = BITS < 3 ? BITS : 3, LOW1 = BITS1 < 3 ? BITS1 : 3, SUBSETS = 1 << LOW;
    constexpr int CODES = 1 << BITS, CODES1 = BITS1 && BITS1 != BITS ? 1 << BITS1 : 0;
    constexpr int TABLE = 16 * (CODES + CODES1), FETCH = (TABLE / 4 + SPLITS * 32 - 1) / (SPLITS * 32);
    static_assert(BITS >= 2 && BITS <= 8 && BITS1 <= BITS && BITS1 != 1);
    static_assert(CHUNK <= 16, "counts lie in -2^22 .. 2^22");
    static_assert(WARPS % SPLITS == 0 && SLOTS <= T && (LIVE == PASSES || LIVE == 1));
    SHARED Room<TOKENS, WARPS> room;
    // [WARPS][SLOTS][BITS][32], the activations' bits [TOKENS][OWN][WARPS][32], then for each team the
    // coefficients of its row block and of the next [2][TABLE]
    uint4* const ring = dynamic_shared();
    uint4* const activations = ring + WARPS * SLOTS * BITS * 32;

    const int thread = thread_index(), warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int team = warp / SPLITS, member = warp % SPLITS, of_team = thread % (SPLITS * 32);
    const int teams = block_count() * TEAMS, first = block_index() + team * block_count();
    const int count = (a.row_blocks - first + teams - 1) / teams * (BACK == GATED ? 2 : 1);
    auto row_block = [&](int j) {
        return BACK == GATED ? first + j / 2 * teams + j % 2 * a.row_blocks : first + j * teams;
    };
    const int tiles = !RAGGED || member < TILES - (T - 1) * SPLITS ? T : T - 1;  // mine of a row block
    let_next_start();

    uint4* const mine = ring + warp * (SLOTS * BITS * 32) + lane;
    const u32 to = shared_address(mine);
    const uint4* plane_of[BITS];
    UNROLL for (int p = 0; p < BITS; p++) plane_of[p] = a.planes + p * a.plane_stride + (member * 32 + lane);
    // What is asked for next, SLOTS tiles in front of what is multiplied: tile `asked` of my row block
    // j_asked, at `offset` of each plane. `ask` tile n from there, `asked_for` so many.
    int asked = 0, j_asked = 0, offset = row_block(0) * (TILES * 32);
    auto ask = [&](int slot, int n = 0) {
        if (j_asked < count && (!RAGGED || asked + n < tiles)) {
            UNROLL for (int p = 0; p < BITS; p++)
                copy16(to + (slot * BITS + p) * 512, plane_of[p] + offset + n * (SPLITS * 32));
        }
        close_group();
    };
    auto asked_for = [&](int n) {
        asked += n, offset += n * (SPLITS * 32);
        if (asked == T) asked = 0, offset = row_block(++j_asked) * (TILES * 32);
    };

    float* const coefficients =
        reinterpret_cast<float*>(activations + TOKENS * OWN * WARPS * 32) + team * (2 * TABLE);
    auto coefficients_of = [&](int r, int n) {  // four of those of row block r
        const bool other = CODES1 && n >= 4 * CODES;
        const float* from = other ? a.coefficients1 + i64(r) * (16 * CODES1) + (n * 4 - 16 * CODES)
                                  : a.coefficients + i64(r) * (16 * CODES) + n * 4;
        return reinterpret_cast<const float4*>(from);
    };
    UNROLL for (int n = 0; n < FETCH; n++) {
        const int at = of_team + n * SPLITS * 32;
        if (count > 0 && at < TABLE / 4)
            copy16(shared_address(coefficients + 4 * at), coefficients_of(row_block(0), at));
    }
    UNROLL for (int q = 0; q < EARLY; q++) ask(q, q);

    // Activations: lane l of a warp takes columns 8 l .. 8 l + 7 of tiles warp, warp + WARPS, ...
    auto column_of = [&](int i) { return (warp + i * WARPS) * 256 + lane * 8; };
    uint4 factor[FRONT == NORM ? OWN : 1];
    if (FRONT == NORM) {
        UNROLL for (int i = 0; i < OWN; i++)
            factor[i] = column_of(i) < a.columns
                            ? load_constant(reinterpret_cast<const uint4*>(a.weight + column_of(i)))
                            : uint4{0, 0, 0, 0};
    }
    wait_for_last();
    u32 largest[TOKENS];
    UNROLL for (int m = 0; m < TOKENS; m++) {
        uint4 v[OWN], delta[FRONT == NORM ? OWN : 1];
        float square = 0.0f;
        UNROLL for (int i = 0; i < OWN; i++) {
            const int column = column_of(i);
            const bool inside = column < a.columns;
            v[i] = inside ? load_written(reinterpret_cast<const uint4*>(a.x + m * a.x_stride + column))
                          : uint4{0, 0, 0, 0};
            if (FRONT == NORM && inside && a.delta)
                delta[i] =
                    load_written(reinterpret_cast<const uint4*>(a.delta + m * a.delta_stride + column));
        }
        // the rest of the ring: the activations would have to queue behind it
        if (m == 0) {
            UNROLL for (int q = EARLY; q < SLOTS; q++) ask(q, q);
            asked_for(SLOTS);
        }
        UNROLL for (int i = 0; i < OWN; i++) {
            const int column = column_of(i);
            if (column >= a.columns) continue;
            if (FRONT == NORM) {
                if (a.delta) {
                    UNROLL for (int c = 0; c < 4; c++)
                        word(v[i], c) = add_halves<TYPE>(word(v[i], c), word(delta[i], c));
                }
                UNROLL for (int c = 0; c < 8; c++) {
                    const float wide = value_of<TYPE>(v[i], c);
                    square = multiply_add(wide, wide, square);
                }
                if (block_index() == 0)
                    store(reinterpret_cast<uint4*>(a.residual + m * a.residual_stride + column), v[i]);
            }
        }
        if (FRONT == NORM) {
            UNROLL for (int mask = 16; mask; mask /= 2) square += shuffle_xor(square, mask);
            if (lane == 0) room.squares[m][warp] = square;
            sync_block();
            square = 0.0f;
            UNROLL for (int w = 0; w < WARPS; w++) square += room.squares[m][w];
            const float normal = reciprocal_root(square / float(a.columns) + a.epsilon);
            UNROLL for (int i = 0; i < OWN; i++)
                UNROLL for (int c = 0; c < 4; c++) {  // rounded as transformers does
                    const u32 normed = both<TYPE>(value_of<TYPE>(v[i], 2 * c) * normal,
                                                  value_of<TYPE>(v[i], 2 * c + 1) * normal);
                    word(v[i], c) = multiply_halves<TYPE>(normed, word(factor[i], c));
                }
        }
        largest[m] = put<TYPE, OWN, WARPS>(v, activations + (m * OWN * WARPS + warp) * 32, lane);
        if (TEAMS > 1 && lane == 0) room.largest[m][warp] = largest[m];
    }
    // One scale for the columns that a warp's products add up: those of its places in all teams.
    if (TEAMS > 1) sync_block();
    float scale[TOKENS];
    UNROLL for (int m = 0; m < TOKENS; m++) {
        if (TEAMS > 1) {
            UNROLL for (int other = 0; other < TEAMS; other++) {
                const u32 theirs = room.largest[m][other * SPLITS + member];
                largest[m] = theirs > largest[m] ? theirs : largest[m];
            }
        }
        const u32 least = 0x0DA24260;  // 1e-30
        scale[m] = float_of(largest[m] > least ? largest[m] : least) * (1.0f / 32767.0f);
        const int sum =
            split<TYPE, OWN, WARPS>(activations + (m * OWN * WARPS + warp) * 32, lane, scale[m]);
        if (lane == 0) room.part[m][warp] = float(sum) * scale[m];
    }
    wait_pending(SLOTS - 1);  // the first coefficients are there
    sync_block();
    const uint4* const my_bits = activations + member * 32 + lane;
    // Lane t holds bits 2 t and 2 t + 1 of an octet; the highest of two's complement counts negatively.
    const float place = float(1 << (2 * t));
    const int sign = t == 3 ? -2 : 2;
    float gate[TOKENS];

    int slot = 0;
    for (int j = 0; j < count; j++) {
        const float* const coefficient = coefficients + (j & 1) * TABLE;
        float4 next[FETCH];
        UNROLL for (int n = 0; n < FETCH; n++)
            if (j + 1 < count && of_team + n * SPLITS * 32 < TABLE / 4)
                next[n] = load_constant(coefficients_of(row_block(j + 1), of_team + n * SPLITS * 32));
        float top[TOKENS] = {}, bottom[TOKENS] = {};
        NO_UNROLL for (int begin = 0; begin < T; begin += CHUNK) {
            const int end = begin + CHUNK < T ? begin + CHUNK : T, slot_of_begin = slot;
            if (LIVE < PASSES) wait_pending(SLOTS - CHUNK);
            UNROLL for (int pass = 0; pass < PASSES; pass += LIVE) {
                int acc[LIVE][TOKENS][SUBSETS][2][4] = {};
                UNROLL for (int live = 0; live < LIVE; live++)
                    UNROLL for (int m = 0; m < TOKENS; m++)
                        UNROLL for (int s = 0; s < SUBSETS; s++)
                            acc[live][m][s][0][0] = acc[live][m][s][0][2] = int(WHOLE_BITS);
                slot = slot_of_begin;
                NO_UNROLL for (int i = begin; i < end; i += TURN) {
                    UNROLL for (int n = 0; n < TURN; n++) {
                        const int at = TURN > 1 ? n : slot;
                        if (LIVE == PASSES) wait_pending(SLOTS - 1);
                        const uint4* from = mine + at * (BITS * 32);
                        uint4 plane[BITS], b[TOKENS];
                        UNROLL for (int p = 0; p < BITS; p++)
                            if (p < 3 || LIVE == PASSES || pass >> (p - 3) & 1) plane[p] = from[p * 32];
                        UNROLL for (int m = 0; m < TOKENS; m++)
                            b[m] = my_bits[(m * OWN * WARPS + (i + n) * SPLITS) * 32];
                        UNROLL for (int live = 0; live < LIVE; live++) {
                            const int high = pass + live;
                            // of the subsets of the first planes, with those of `high`
                            u32 joint[SUBSETS][4];
                            UNROLL for (int p = 3; p < BITS; p++) {
                                if (!(high >> (p - 3) & 1)) continue;
                                const bool begins = (high & ((1 << (p - 3)) - 1)) == 0;
                                UNROLL for (int k = 0; k < 4; k++)
                                    joint[0][k] =
                                        begins ? word(plane[p], k) : joint[0][k] & word(plane[p], k);
                            }
                            UNROLL for (int p = 0; p < LOW; p++)
                                UNROLL for (int k = 0; k < 4; k++)
                                    joint[1 << p][k] =
                                        high ? word(plane[p], k) & joint[0][k] : word(plane[p], k);
                            UNROLL for (int s = 0; s < SUBSETS; s++) {
                                if (s == 0 && high == 0) continue;
                                if (s & (s - 1)) {  // more than one plane
                                    const int most = s & 4 ? 4 : 2;
                                    UNROLL for (int k = 0; k < 4; k++)
                                        joint[s][k] = joint[most][k] & joint[s - most][k];
                                }
                                UNROLL for (int m = 0; m < TOKENS; m++) {
                                    if (m && (s >= 1 << LOW1 || high >= PASSES1)) continue;
                                    mma_bits(acc[live][m][s][0], joint[s], b[m].x, b[m].y);
                                    mma_bits(acc[live][m][s][1], joint[s], b[m].z, b[m].w);
                                }
                            }
                        }
                        if (LIVE == PASSES) ask(at, n);
                    }
                    if (LIVE == PASSES) asked_for(TURN);
                    if (TURN == 1 && ++slot == SLOTS) slot = 0;
                }
                // what the subsets are worth
                UNROLL for (int live = 0; live < LIVE; live++)
                    UNROLL for (int m = 0; m < TOKENS; m++) {
                        const int high = pass + live, bits = m ? BITS1 : BITS;
                        if (m && high >= PASSES1) continue;
                        const float* const up = coefficient + (m && CODES1 ? 16 * CODES : 0) + (g << bits);
                        const float* const down = up + (8 << bits);
                        float4 up_worth, down_worth;
                        UNROLL for (int s = 0; s < (m ? 1 << LOW1 : SUBSETS); s++) {
                            if (s % 4 == 0) {
                                const int at = (high << (m ? LOW1 : LOW)) + s;
                                up_worth = reinterpret_cast<const float4*>(up)[at / 4];
                                down_worth = reinterpret_cast<const float4*>(down)[at / 4];
                            }
                            if (s == 0 && high == 0) continue;
                            const int(&of)[2][4] = acc[live][m][s];
                            const int high0 = of[1][0] + sign * of[1][1], high1 = of[1][2] + sign * of[1][3];
                            const float v0 = whole(of[0][0] + 2 * of[0][1] + 256 * high0);
                            const float v1 = whole(of[0][2] + 2 * of[0][3] + 256 * high1);
                            const float t0 = s % 4 == 0   ? up_worth.x
                                             : s % 4 == 1 ? up_worth.y
                                             : s % 4 == 2 ? up_worth.z
                                                          : up_worth.w;
                            const float t1 = s % 4 == 0   ? down_worth.x
                                             : s % 4 == 1 ? down_worth.y
                                             : s % 4 == 2 ? down_worth.z
                                                          : down_worth.w;
                            top[m] = multiply_add(t0, v0, top[m]);
                            bottom[m] = multiply_add(t1, v1, bottom[m]);
                        }
                    }
            }
            if (LIVE < PASSES)
                NO_UNROLL for (int i = begin, free = slot_of_begin; i < end; i++) {
                    ask(free);
                    asked_for(1);
                    if (++free == SLOTS) free = 0;
                }
        }
        float constant[TOKENS];  // read before another warp puts those of the row block after next there
        UNROLL for (int m = 0; m < TOKENS; m++) {
            top[m] *= place * scale[m], bottom[m] *= place * scale[m];
            UNROLL for (int mask = 1; mask <= 2; mask *= 2) {
                top[m] += shuffle_xor(top[m], mask);
                bottom[m] += shuffle_xor(bottom[m], mask);
            }
            if (t == 0) {
                room.sums[j & 1][m][warp][g] = top[m];
                room.sums[j & 1][m][warp][g + 8] = bottom[m];
            }
            constant[m] = m && CODES1 ? coefficient[16 * CODES + (lane % 16) * CODES1]
                                      : coefficient[(lane % 16) * CODES];
        }
        UNROLL for (int n = 0; n < FETCH; n++)
            if (j + 1 < count && of_team + n * SPLITS * 32 < TABLE / 4)
                reinterpret_cast<float4*>(coefficients + ((j + 1) & 1) * TABLE)[of_team + n * SPLITS * 32] =
                    next[n];
        sync_team<TEAMS, SPLITS>(team);
        if (member == (BACK == GATED ? j / 2 : j) % SPLITS && lane < 16) {
            const int row = row_block(j) * 16 + lane;
            UNROLL for (int m = 0; m < TOKENS; m++) {
                float x_sum = 0.0f;
                UNROLL for (int w = 0; w < WARPS; w++) x_sum += room.part[m][w];
                float y = constant[m] * x_sum;
                UNROLL for (int w = 0; w < SPLITS; w++) y += room.sums[j & 1][m][team * SPLITS + w][lane];
                if (a.bias && row < a.rows) y += widen<TYPE>(load_constant(a.bias + row));
                if (BACK == STORE) {
                    if (row < a.rows) store(a.y + m * a.y_stride + row, narrow<TYPE>(y));
                } else if (j % 2 == 0) {  // rounded as transformers does
                    y = widen<TYPE>(narrow<TYPE>(y));
                    gate[m] = widen<TYPE>(narrow<TYPE>(y / (1.0f + exponential(-y))));
                } else {
                    store(a.y + m * a.y_stride + row - a.row_blocks * 16,
                          narrow<TYPE>(gate[m] * widen<TYPE>(narrow<TYPE>(y))));
                }
            }
        }
    }
}
