// Products of bf16 tiles on Hopper's tensor cores by groups of four warps (wgmma), from shared memory.
//
// Tiles are panels of 64 columns: rows of 128 bytes, whose 16-byte parts are swizzled by the row's number modulo 8. A
// group has 64 rows of an accumulator, its warps 16 each.

static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "a row is one or two panels");

// Sizes of attention's blocks and steps.
constexpr u32 QUERY_PIECES = 1;
constexpr u32 FORWARD_KEYS = 128;
constexpr u32 QUERY_KEYS = 128;
// Blocks of queries that share a multiprocessor.
constexpr u32 QUERY_BLOCKS = 1;
// Rows that are multiplied together.
template <u32 M> constexpr u32 UNIT_ROWS = 64;

constexpr u32 PANEL = 64;

template <u32 ROWS> constexpr u32 TILE_ELEMENTS = ROWS * HEAD_DIM;

// Where a tile has an element.
template <u32 ROWS> __device__ __forceinline__ u32 place(u32 row, u32 column) {
    return (column / PANEL * ROWS + row) * PANEL + (column / CHUNK % 8 ^ row % 8) * CHUNK + column % CHUNK;
}

// Waits for this thread's copies, and lets tensor cores see them.
__device__ __forceinline__ void finish_copies() {
    asm volatile("cp.async.wait_all;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Descriptor of an operand from `address` on, in units of 16 bytes: 8 rows of a panel take 1024 bytes, and where rows of
// the operand run along columns of the product, panels of columns lie `panel_bytes` apart.
__device__ __forceinline__ u64 descriptor(u32 address, u32 panel_bytes) {
    constexpr u64 SWIZZLE_128_BYTES = 1;
    return SWIZZLE_128_BYTES << 62 | u64(1024 / 16) << 32 | u64(panel_bytes / 16) << 16 | (address & 0x3ffff) >> 4;
}

// How far a descriptor moves for byte offsets.
constexpr u64 descriptor_step(u32 bytes) { return bytes / 16; }

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all but the group's last PENDING products, of which `c` is none. The compiler must not read `c` before.
template <u32 PENDING, u32 M, u32 N> __device__ __forceinline__ void finish_products(float (&c)[M][N][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#pragma unroll
    for (u32 n = 0; n < N; n++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) asm volatile("" : "+f"(c[0][n][i])::"memory");
    }
}

// Operands of an instruction: names of its first 30 or 60 sums, the others follow by hand; and variables.
#define NAMES_5(tens, a, b, c, d, e) "%" #tens #a ", %" #tens #b ", %" #tens #c ", %" #tens #d ", %" #tens #e ", "
#define NAMES_10(tens) NAMES_5(tens, 0, 1, 2, 3, 4) NAMES_5(tens, 5, 6, 7, 8, 9)
#define NAMES_30 NAMES_10() NAMES_10(1) NAMES_10(2)
#define NAMES_60 NAMES_30 NAMES_10(3) NAMES_10(4) NAMES_10(5)
#define SUMS_4(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define SUMS_16(n) SUMS_4(n), SUMS_4(n + 1), SUMS_4(n + 2), SUMS_4(n + 3)
#define SUMS_32(n) SUMS_16(n), SUMS_16(n + 4)

// c = a bᵀ, or c += a bᵀ with `add`, for 64 rows, 64 columns and 16 products each; rows of both operands run along the
// products.
__device__ __forceinline__ void multiply(float (&c)[8][4], u64 a, u64 b, u32 add) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.u32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES_30 "%30, %31}, %32, %33, p, 1, 1, 0, 0;\n"
        "}\n"
        : SUMS_32(0)
        : "l"(a), "l"(b), "r"(add));
}

// The same for 128 columns.
__device__ __forceinline__ void multiply(float (&c)[16][4], u64 a, u64 b, u32 add) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.u32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES_60
        "%60, %61, %62, %63}, %64, %65, p, 1, 1, 0, 0;\n"
        "}\n"
        : SUMS_32(0), SUMS_32(8)
        : "l"(a), "l"(b), "r"(add));
}

// c += a b for 64 rows, 64 columns and 16 products each; rows of b run along the columns.
__device__ __forceinline__ void multiply(float (&c)[8][4], const u32 (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES_30
        "%30, %31}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
        : SUMS_32(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// The same for 128 columns.
__device__ __forceinline__ void multiply(float (&c)[16][4], const u32 (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES_60
        "%60, %61, %62, %63}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
        : SUMS_32(0), SUMS_32(8)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// Starts c = left · rightᵀ: scores of the group's rows of one tile, of which the warp's are from `first` on, and 8 N
// rows of another.
template <u32 LEFT_ROWS, u32 M, u32 N>
__device__ __forceinline__ void multiply_rows(float (&c)[M][N][4], const bf16* left, u32 first, const bf16* right) {
    const u64 a = descriptor(shared_address(left + first / 64 * 64 * PANEL), 0);
    const u64 b = descriptor(shared_address(right), 0);
    begin_products();
#pragma unroll
    for (u32 k = 0; k < HEAD_DIM; k += K_STEP) {
        const u32 column = k % PANEL * sizeof(bf16), panel = k / PANEL * PANEL * sizeof(bf16);
        multiply(c[0], a + descriptor_step(panel * LEFT_ROWS + column), b + descriptor_step(panel * 8 * N + column), k);
    }
    commit_products();
}

// Starts c += weights · right, for the 8 N rows of a tile.
template <u32 M, u32 N>
__device__ __forceinline__ void multiply_columns(
    float (&c)[M][HEAD_DIM / 8][4], const Weights<M, N>& weights, const bf16* right) {
    constexpr u32 ROW_BYTES = PANEL * sizeof(bf16);
    const u64 b = descriptor(shared_address(right), 8 * N * ROW_BYTES);
    begin_products();
#pragma unroll
    for (u32 k = 0; k < N / 2; k++) multiply(c[0], weights.step[k][0], b + descriptor_step(k * K_STEP * ROW_BYTES));
    commit_products();
}
