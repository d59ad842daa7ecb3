// y = x W' + bias for 3 to 32 tokens on the 16-bit tensor cores (sm_90): table values are put together in
// registers, straight into operands of the product.
//
// A tile is 16 rows x 256 columns; planes are as for bits.cu. `prmt` looks up the low and the high bytes of
// four table values and joins them: exact values of the type. Thread t of a row takes columns 32 s + 8 t + i
// of a half tile in two products (i < 4, i >= 4): the order of columns in a product is free where weights and
// activations agree. An octet is eight tokens.
//
// What a multiprocessor reads of the activations is what bounds many tokens. So a block keeps its columns'
// activations in shared memory for all the rows that it multiplies, and PARTS blocks, a cluster, share the
// columns. Clusters are persistent: cluster i takes passes i, i + clusters, ... of ROWS * SHARE row blocks
// each. A warp multiplies SHARE row blocks by the activations that it loads once; WARPS warps of a block
// share its columns, ROWS times. Sums of a pass go to the block of the cluster that owns the output, through
// distributed shared memory, and are added there in a fixed order, while the next pass is multiplied.
#include "instructions.cuh"

enum Back { STORE, GATED };  // what is done with the sum: nothing; silu(gate) * up

struct Arguments {
    const uint4* planes;     // [P, N/16, K/256, 32]
    const u32* tables;       // [N padded, 2^b / 2]: bytes of the values, as of `table_halves`
    const u16* bias;         // [N], or null
    const u16* x;            // [M, K], rows x_stride apart
    u16* y;                  // [M, N]
    i64 plane_stride;        // in uint4
    i64 x_stride, y_stride;  // in elements, x's a multiple of 8
    int tokens, rows, columns;  // M, N, K
    int row_blocks;          // N / 16
};

DEVICE u32 rotate_left(u32 a, int n) { return a << n | a >> (32 - n); }

// Selectors of `look_up` for a word of each plane (eight columns for each s): the lower three bits of the
// codes, a nibble each, in the lower half of octet[s][0] for columns 0 to 3, of octet[s][1] for 4 to 7; for 4
// bits also `which`: nibble i is i, plus 4 where the highest bit is set.
template <int BITS> DEVICE void selectors(const u32 (&p)[BITS], u32 (&octet)[4][2], u32 (&which)[4][2]) {
    if (BITS == 2) {
        const u32 low = rotate_left(p[1], 31);
        const u32 even = pick(p[0], low, 0xAAAAAAAA), odd = pick(low, p[0], 0xAAAAAAAA);
        const u32 last = even & 0xCCCCCCCC, middle = odd & 0x66666666, second = even & 0x33333333,
                  first = odd & 0x99999999;
        octet[0][0] = last >> 2, octet[0][1] = last >> 18;
        octet[1][0] = middle >> 1, octet[1][1] = middle >> 17;
        octet[2][0] = second, octet[2][1] = second >> 16;
        octet[3][0] = rotate_left(first, 1), octet[3][1] = first >> 15;
        return;
    }
    const u32 high = p[BITS - 3], middle = rotate_left(p[BITS - 2], 31), low = rotate_left(p[BITS - 1], 30);
    const u32 even = pick(high, middle, 0xAAAAAAAA), odd = pick(middle, high, 0xAAAAAAAA);
    const u32 low_even = low & 0xAAAAAAAA, low_odd = low & 0x55555555;  // no bit where a nibble's fourth is
    const u32 at[4] = {pick(even, low_even, 0xCCCCCCCC), pick(odd, low_odd, 0x66666666),
                       pick(even, low_even, 0x33333333), pick(odd, low_odd, 0x99999999)};
    octet[0][0] = at[0] >> 1, octet[0][1] = at[0] >> 17;
    octet[1][0] = at[1], octet[1][1] = at[1] >> 16;
    octet[2][0] = rotate_left(at[2], 1), octet[2][1] = at[2] >> 15;
    octet[3][0] = rotate_left(at[3], 2), octet[3][1] = at[3] >> 14;
    if (BITS == 4) {
        UNROLL for (int s = 0; s < 4; s++) {
            const u32 bit = s == 0 ? p[0] >> 1 : s == 1 ? p[0] : rotate_left(p[0], s - 1);
            which[s][0] = (bit & 0x44444444) | 0x32103210;
            which[s][1] = which[s][0] >> 16;
        }
    }
}

// The values of four codes, two words of two each.
template <int BITS>
DEVICE void values(const u32 (&table)[1 << (BITS - 1)], u32 octet, u32 which, u32& first, u32& second) {
    constexpr int HIGH = 0, LOW = BITS == 2 ? 1 : 2, WIDE = BITS == 2 ? 0 : 1;
    u32 low = look_up(table[LOW], table[LOW + WIDE], octet);
    u32 high = look_up(table[HIGH], table[HIGH + WIDE], octet);
    if (BITS == 4) {
        constexpr int UP = BITS == 4 ? 4 : 0;
        low = look_up(low, look_up(table[UP + LOW], table[UP + LOW + WIDE], octet), which);
        high = look_up(high, look_up(table[UP + HIGH], table[UP + HIGH + WIDE], octet), which);
    }
    first = look_up(low, high, 0x5140);
    second = look_up(low, high, 0x7362);
}

// acc += the tile's weights times x, for SHARE row blocks. `x`: the lane's, of half 0, s = 0 and the first
// octet; octets are 32 words of 16 bytes apart.
template <Type TYPE, int BITS, int OCTETS, int SHARE>
DEVICE void add_tile(float (&acc)[SHARE][OCTETS][4], const u32 (&table)[SHARE][2][1 << (BITS - 1)],
                     const uint4 (&plane)[SHARE][BITS], const uint4* x) {
    UNROLL for (int h = 0; h < 2; h++) {
        u32 octet[SHARE][2][4][2], which[SHARE][2][4][2];
        UNROLL for (int c = 0; c < SHARE; c++)
            UNROLL for (int r = 0; r < 2; r++) {
                u32 p[BITS];
                UNROLL for (int k = 0; k < BITS; k++)
                    p[k] = h ? (r ? plane[c][k].w : plane[c][k].z) : (r ? plane[c][k].y : plane[c][k].x);
                selectors<BITS>(p, octet[c][r], which[c][r]);
            }
        UNROLL for (int s = 0; s < 4; s++) {
            uint4 b[OCTETS];
            UNROLL for (int n = 0; n < OCTETS; n++) b[n] = x[((4 * h + s) * OCTETS + n) * 32];
            UNROLL for (int part = 0; part < 2; part++)
                UNROLL for (int c = 0; c < SHARE; c++) {
                    u32 a[4];
                    UNROLL for (int r = 0; r < 2; r++)
                        values<BITS>(table[c][r], octet[c][r][s][part],
                                     BITS == 4 ? which[c][r][s][part] : 0, a[r], a[r + 2]);
                    UNROLL for (int n = 0; n < OCTETS; n++)
                        mma_halves<TYPE>(acc[c][n], a, part ? b[n].z : b[n].x, part ? b[n].w : b[n].y);
                }
        }
    }
}

template <Type TYPE, int BITS, int OCTETS, int TILES, int PARTS, int WARPS, int ROWS, int SHARE, int SLOTS,
          int BLOCKS>
KERNEL(WARPS * ROWS * 32, BLOCKS) halves_product(const Arguments a) {
    constexpr int THREADS = WARPS * ROWS * 32, PASS = ROWS * SHARE;
    constexpr int ACROSS = PARTS * WARPS;  // warps that share the columns
    constexpr int T = (TILES + ACROSS - 1) / ACROSS;
    constexpr bool RAGGED = TILES % ACROSS != 0;  // some warps have no last tile
    constexpr int UNITS = PASS * OCTETS, OWNED = (UNITS + PARTS - 1) / PARTS;
    constexpr int WORDS = 1 << (BITS - 1), TABLE = PASS * 16 * WORDS;  // of a row, of a pass
    constexpr int FETCH = (TABLE / 4 + THREADS - 1) / THREADS;
    static_assert(BITS >= 2 && BITS <= 4 && (PARTS & (PARTS - 1)) == 0);
    // [WARPS * ROWS][SLOTS][SHARE][BITS][32], [T][WARPS][2][4][OCTETS][32], [2][OWNED][ACROSS][32],
    // [3][TABLE]
    uint4* const ring = dynamic_shared();
    uint4* const activations = ring + WARPS * ROWS * SLOTS * SHARE * BITS * 32;
    float4* const sums = reinterpret_cast<float4*>(activations + T * WARPS * 8 * OCTETS * 32);
    uint4* const tables = reinterpret_cast<uint4*>(sums + 2 * OWNED * ACROSS * 32);

    const u32 thread = thread_index();
    const int warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int w = u32(warp) % WARPS, of_rows = u32(warp) / WARPS, rank = u32(block_index()) % PARTS;
    const int clusters = u32(block_count()) / PARTS, cluster = u32(block_index()) / PARTS;
    const int passes = (a.row_blocks + PASS - 1) / PASS;
    const int count = cluster < passes ? (passes - cluster + clusters - 1) / clusters : 0;
    const int across = rank * WARPS + w;
    const bool has_last = !RAGGED || across < TILES - (T - 1) * ACROSS;
    cluster_arrive();  // that all blocks run, before one writes to another
    let_next_start();

    uint4* const mine = ring + warp * (SLOTS * SHARE * BITS * 32) + lane;
    int to_slot = 0, to_tile = 0, to_pass = cluster;
    auto refill = [&]() {
        if (to_pass < passes && (to_tile < T - 1 || has_last)) {
            UNROLL for (int c = 0; c < SHARE; c++) {
                const int row_block = to_pass * PASS + of_rows * SHARE + c;
                if (row_block >= a.row_blocks) continue;
                const uint4* from =
                    a.planes + (i64(row_block) * TILES + across + to_tile * ACROSS) * 32 + lane;
                const u32 to = shared_address(mine + (to_slot * SHARE + c) * (BITS * 32));
                UNROLL for (int p = 0; p < BITS; p++) copy16(to + p * 512, from + p * a.plane_stride);
            }
        }
        close_group();
        if (++to_slot == SLOTS) to_slot = 0;
        if (++to_tile == T) to_tile = 0, to_pass += clusters;
    };
    UNROLL for (int q = 0; q < SLOTS; q++) refill();

    auto table_of = [&](u32 j, u32 n) {  // four words of the tables of my pass j
        const u32* from = a.tables + i64(cluster + j * clusters) * TABLE + n * 4;
        return load_constant(reinterpret_cast<const uint4*>(from));
    };
    auto table_exists = [&](u32 j, u32 n) {
        return n < TABLE / 4 && j < count && (cluster + j * clusters) * PASS + n / (4 * WORDS) < a.row_blocks;
    };
    UNROLL for (int j = 0; j < 2; j++)
        UNROLL for (int n = 0; n < FETCH; n++)
            if (table_exists(j, thread + n * THREADS))
                tables[j * (TABLE / 4) + thread + n * THREADS] = table_of(j, thread + n * THREADS);

    wait_for_last();
    UNROLL for (int i = 0; i < T; i++)
        for (int k = of_rows; k < 8 * OCTETS; k += ROWS) {
            const int token = k % OCTETS * 8 + g;
            const int column = (across + i * ACROSS) * 256 + k / OCTETS * 32 + t * 8;
            const bool inside = token < a.tokens && column < a.columns;
            copy16_or_zero(shared_address(activations + ((i * WARPS + w) * 8 * OCTETS + k) * 32 + lane),
                           a.x + (inside ? token * a.x_stride + column : 0), inside);
        }
    close_group();
    wait_pending(0);
    sync_block();
    cluster_wait();

    auto sums_at = [&](int j, int index, int from) {
        return sums + (((j & 1) * OWNED + index) * ACROSS + from) * 32;
    };
    // Lane 4 g + t's sums lie where neither the lanes of a warp nor the threads that add them collide.
    const int place = t * 8 + (g ^ (2 * t));
    auto finish = [&](int j) {
        for (u32 e = thread; e < OWNED * 128; e += THREADS) {
            const u32 pair = e / 32 % 4, row_in = e % 16, odd = e / 16 % 2, index = e / 128;
            const u32 unit = index * PARTS + u32(rank - j) % PARTS;
            const u32 row = ((cluster + j * clusters) * PASS + unit / OCTETS) * 16 + row_in;
            const int token = unit % OCTETS * 8 + 2 * pair + odd;
            if (unit >= UNITS || row >= a.rows || token >= a.tokens) continue;
            const float* from = reinterpret_cast<const float*>(sums_at(j, index, 0)) +
                                (pair * 8 + (row_in % 8 ^ (2 * pair))) * 4 + row_in / 8 * 2 + odd;
            float y = 0.0f;
            UNROLL for (int k = 0; k < ACROSS; k++) y += from[k * 128];
            if (a.bias) y += widen<TYPE>(load_constant(a.bias + row));
            store(a.y + token * a.y_stride + row, narrow<TYPE>(y));
        }
    };

    int slot = 0;
    for (int j = 0; j < count; j++) {
        uint4 next[FETCH];  // tables of the pass after next
        UNROLL for (int n = 0; n < FETCH; n++)
            if (table_exists(j + 2, thread + n * THREADS)) next[n] = table_of(j + 2, thread + n * THREADS);
        u32 table[SHARE][2][WORDS];
        const u32* const words = reinterpret_cast<const u32*>(tables + j % 3 * (TABLE / 4));
        UNROLL for (int c = 0; c < SHARE; c++)
            UNROLL for (int r = 0; r < 2; r++)
                UNROLL for (int k = 0; k < WORDS; k++)
                    table[c][r][k] = words[((of_rows * SHARE + c) * 16 + 8 * r + g) * WORDS + k];
        float acc[SHARE][OCTETS][4] = {};
        NO_UNROLL for (int i = 0; i < T; i++) {
            wait_pending(SLOTS - 1);
            uint4 plane[SHARE][BITS];
            UNROLL for (int c = 0; c < SHARE; c++)
                UNROLL for (int p = 0; p < BITS; p++)
                    plane[c][p] = mine[((slot * SHARE + c) * BITS + p) * 32];
            if (++slot == SLOTS) slot = 0;
            refill();
            if (i == T - 1 && !has_last) continue;
            add_tile<TYPE, BITS, OCTETS, SHARE>(acc, table, plane,
                                                activations + (i * WARPS + w) * (8 * OCTETS * 32) + lane);
        }
        if (j) {
            cluster_wait();
            finish(j - 1);
        }
        UNROLL for (int c = 0; c < SHARE; c++)
            UNROLL for (int n = 0; n < OCTETS; n++) {
                const u32 unit = (of_rows * SHARE + c) * OCTETS + n;
                const float(&v)[4] = acc[c][n];
                store_in_cluster(sums_at(j, unit / PARTS, across) + place, (unit + j) % PARTS,
                                 float4{v[0], v[1], v[2], v[3]});
            }
        UNROLL for (int n = 0; n < FETCH; n++)
            if (table_exists(j + 2, thread + n * THREADS))
                tables[(j + 2) % 3 * (TABLE / 4) + thread + n * THREADS] = next[n];
        cluster_arrive();
    }
    if (count) {
        cluster_wait();
        finish(count - 1);
    }
}

// The same for 3 to 32 tokens without clusters: SPLITS warps, a team, share the columns of a row block, warp
// s of a team taking tiles s, s + SPLITS, ..., T of them. A block has TEAMS = WARPS / SPLITS teams; team q of
// all takes row blocks q, q + teams, ... Activations lie in shared memory once for the block, the tiles of
// PHASE steps of a team at a time: of all phases (HELD = PHASES), and teams never wait for each other behind
// their first row block; or of two, the next one's on its way, and the block meets at each phase.
//
// A warp has a ring of SLOTS tiles that cp.async fills across row blocks: half of it before waiting for the
// kernel in front, then turn by turn with the first phases' activations, which would have to queue behind
// all of it.
//
// GATED: the first half of the row blocks is gate, the second up; a team takes one of each in turn, and y
// [M, N / 2] is silu(gate) * up.
template <Type TYPE, Back BACK, int BITS, int OCTETS, int TILES, int WARPS, int SPLITS, int SLOTS, int PHASE,
          int HELD, int BLOCKS>
KERNEL(WARPS * 32, BLOCKS) teams_product(const Arguments a) {
    constexpr int TEAMS = WARPS / SPLITS, T = (TILES + SPLITS - 1) / SPLITS;
    constexpr int PHASES = (T + PHASE - 1) / PHASE, LAST = T - (PHASES - 1) * PHASE;
    constexpr bool RAGGED = TILES % SPLITS != 0;  // some warps have no last tile
    constexpr bool KEEPS = HELD == PHASES;
    constexpr int EARLY = SLOTS / 2, WORDS = 1 << (BITS - 1);
    constexpr int UNITS = PHASE * SPLITS * 8 * OCTETS;  // of 512 bytes: the activations of a phase
    static_assert(BITS >= 2 && BITS <= 4 && WARPS % SPLITS == 0 && SLOTS >= 2);
    static_assert(PHASE <= T && (KEEPS || HELD == 2));
    // [WARPS][SLOTS][BITS][32], [HELD][UNITS][32], [WARPS][OCTETS][32]
    uint4* const ring = dynamic_shared();
    uint4* const activations = ring + WARPS * SLOTS * BITS * 32;
    float4* const sums = reinterpret_cast<float4*>(activations + HELD * UNITS * 32);

    const int thread = thread_index(), warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int team = warp / SPLITS, member = warp % SPLITS, of_team = thread % (SPLITS * 32);
    const int teams = block_count() * TEAMS, first = block_index() + team * block_count();
    constexpr int EACH = BACK == GATED ? 2 : 1;
    const int row_blocks = a.row_blocks / EACH, count = (row_blocks - first + teams - 1) / teams * EACH;
    auto row_block = [&](int j) { return first + j / EACH * teams + j % EACH * row_blocks; };
    // how often the block meets: as often as its first team has a row block, or once
    const int rounds = KEEPS ? (count ? count : 1) : (row_blocks - block_index() + teams - 1) / teams * EACH;
    const bool has_last = !RAGGED || member < TILES - (T - 1) * SPLITS;  // whether my tile T - 1 exists
    let_next_start();

    auto load_table = [&](u32(&to)[2][WORDS], int j) {  // of my rows of my row block j
        UNROLL for (int r = 0; r < 2; r++) {
            const u32* from = a.tables + (i64(row_block(j)) * 16 + 8 * r + g) * WORDS;
            if (WORDS == 2) {
                const uint2 two = load_constant(reinterpret_cast<const uint2*>(from));
                to[r][0] = two.x, to[r][1] = two.y;
            } else {
                UNROLL for (int k = 0; k < WORDS / 4; k++) {
                    const uint4 four = load_constant(reinterpret_cast<const uint4*>(from) + k);
                    to[r][4 * k % WORDS] = four.x, to[r][(4 * k + 1) % WORDS] = four.y;
                    to[r][(4 * k + 2) % WORDS] = four.z, to[r][(4 * k + 3) % WORDS] = four.w;
                }
            }
        }
    };
    u32 table[2][WORDS] = {};
    if (count > 0) load_table(table, 0);

    uint4* const mine = ring + warp * (SLOTS * BITS * 32) + lane;
    const u32 to = shared_address(mine);
    const uint4* plane_of[BITS];
    UNROLL for (int p = 0; p < BITS; p++) plane_of[p] = a.planes + p * a.plane_stride + (member * 32 + lane);
    // The tile that is asked for next: tile `ahead` of my row block j_ahead, at `offset` of each plane.
    int ahead = 0, j_ahead = 0, offset = first * (TILES * 32);
    auto ask = [&](int slot) {
        if (j_ahead < count && (!RAGGED || ahead < T - 1 || has_last)) {
            UNROLL for (int p = 0; p < BITS; p++) copy16(to + (slot * BITS + p) * 512, plane_of[p] + offset);
        }
        close_group();
        offset += SPLITS * 32;
        if (++ahead == T) ahead = 0, offset = row_block(++j_ahead) * (TILES * 32);
    };
    // Unit 8 OCTETS i + OCTETS (4 h + s) + n of a phase: octet n of columns 128 h + 32 s .. of its tile i.
    auto copy_phase = [&](int phase, int place) {
        UNROLL for (int k = 0; k < (UNITS + WARPS - 1) / WARPS; k++) {
            const int unit = warp + k * WARPS, token = unit % OCTETS * 8 + g;
            if (UNITS % WARPS && unit >= UNITS) break;
            const int column = phase * (PHASE * SPLITS * 256) + unit / OCTETS * 32 + t * 8;
            const bool inside = token < a.tokens && column < a.columns;
            copy16_or_zero(shared_address(activations + (place * UNITS + unit) * 32 + lane),
                           a.x + (inside ? token * a.x_stride + column : 0), inside);
        }
    };
    UNROLL for (int q = 0; q < EARLY; q++) ask(q);
    wait_for_last();
    UNROLL for (int q = EARLY; q < SLOTS; q++) {  // phase q - EARLY; the rest of them in the last group
        UNROLL for (int f = q - EARLY; f < HELD; f++)
            if (f == q - EARLY || q == SLOTS - 1) copy_phase(f, f);
        ask(q);
    }

    // Lane 4 g + t's sums lie where neither the lanes of a warp nor the threads that add them collide.
    const int place = t * 8 + (g ^ (2 * t));
    constexpr int OUTPUTS = (OCTETS * 128 + SPLITS * 32 - 1) / (SPLITS * 32);  // of a thread and row block
    float gate[OUTPUTS] = {};
    int slot = 0;
    for (int j = 0; j < rounds; j++) {
        const bool works = j < count;
        u32 next[2][WORDS];
        if (j + 1 < count) load_table(next, j + 1);
        float acc[1][OCTETS][4] = {};
        NO_UNROLL for (int f = 0; f < PHASES; f++) {
            const int n = j * PHASES + f;
            if (!KEEPS || j == 0) {  // groups behind that of the phase's activations may be pending
                constexpr int BEHIND = KEEPS ? SLOTS + PHASE - EARLY - 2 : PHASE - 1;
                if (n == 0) wait_pending(SLOTS - EARLY - 1);
                else if (f == 0) wait_pending(LAST < SLOTS ? LAST - 1 : SLOTS - 1);
                else wait_pending(BEHIND < SLOTS ? BEHIND : SLOTS - 1);
                sync_block();
                if (!KEEPS && n && n + 1 < rounds * PHASES)
                    copy_phase(f + 1 < PHASES ? f + 1 : 0, (n + 1) & 1);
            }
            const uint4* x = activations + ((KEEPS ? f : n & 1) * UNITS + member * (8 * OCTETS)) * 32 + lane;
            const int end = f < PHASES - 1 ? PHASE : LAST;
            NO_UNROLL for (int i = 0; i < end; i++, x += SPLITS * 8 * OCTETS * 32) {
                wait_pending(SLOTS - 1);
                uint4 plane[1][BITS];
                UNROLL for (int p = 0; p < BITS; p++) plane[0][p] = mine[(slot * BITS + p) * 32];
                ask(slot);
                if (++slot == SLOTS) slot = 0;
                if (!works || (RAGGED && f == PHASES - 1 && i == LAST - 1 && !has_last)) continue;
                add_tile<TYPE, BITS, OCTETS, 1>(acc, reinterpret_cast<u32(&)[1][2][WORDS]>(table), plane, x);
            }
        }
        if (j) sync_team<TEAMS, SPLITS>(team);  // the sums in front have been read
        UNROLL for (int n = 0; n < OCTETS; n++) {
            const float(&v)[4] = acc[0][n];
            sums[(warp * OCTETS + n) * 32 + place] = float4{v[0], v[1], v[2], v[3]};
        }
        sync_team<TEAMS, SPLITS>(team);
        UNROLL for (int k = 0; k < OUTPUTS; k++) {
            const int e = of_team + k * SPLITS * 32, pair = e / 32 % 4, odd = e / 16 % 2, n = e / 128;
            const int row = row_block(j) * 16 + e % 16, token = n * 8 + 2 * pair + odd;
            if (!works || n >= OCTETS || row >= a.rows || token >= a.tokens) continue;
            const float* from = reinterpret_cast<const float*>(sums + (team * SPLITS * OCTETS + n) * 32) +
                                (pair * 8 + (e % 8 ^ (2 * pair))) * 4 + e / 8 % 2 * 2 + odd;
            float y = 0.0f;
            UNROLL for (int w = 0; w < SPLITS; w++) y += from[w * OCTETS * 128];
            if (a.bias) y += widen<TYPE>(load_constant(a.bias + row));
            u16* const to = a.y + token * a.y_stride + row;
            if (BACK == STORE) {
                store(to, narrow<TYPE>(y));
            } else if (j % 2 == 0) {  // rounded as transformers does
                y = widen<TYPE>(narrow<TYPE>(y));
                gate[k] = widen<TYPE>(narrow<TYPE>(y / (1.0f + exponential(-y))));
            } else {
                store(to - row_blocks * 16, narrow<TYPE>(gate[k] * widen<TYPE>(narrow<TYPE>(y))));
            }
        }
        if (j + 1 < count)
            UNROLL for (int r = 0; r < 2; r++)
                UNROLL for (int k = 0; k < WORDS; k++) table[r][k] = next[r][k];
    }
}
