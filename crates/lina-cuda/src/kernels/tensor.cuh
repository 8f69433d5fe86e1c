// Products of bf16 tiles on tensor cores by single warps (mma.m16n8k16), from shared memory.

// Sizes of attention's blocks and steps: accumulators have to fit into registers.
constexpr u32 QUERY_PIECES = 2;
constexpr u32 FORWARD_KEYS = 64;
constexpr u32 QUERY_KEYS = HEAD_DIM > 64 ? 32 : 64;
// Blocks of queries that share a multiprocessor.
constexpr u32 QUERY_BLOCKS = 2;
// Rows that are multiplied together.
template <u32 M> constexpr u32 UNIT_ROWS = 16 * M;

// Elements between rows in shared memory: eight more than needed put the same columns of eight rows into different
// banks.
constexpr u32 TILE_STRIDE = HEAD_DIM + 8;

template <u32 ROWS> constexpr u32 TILE_ELEMENTS = ROWS * TILE_STRIDE;

// Where a tile has an element.
template <u32 ROWS> __device__ __forceinline__ u32 place(u32 row, u32 column) { return row * TILE_STRIDE + column; }

// Waits for this thread's copies.
__device__ __forceinline__ void finish_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four matrices of 8 rows and 8 columns; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(u32 (&regs)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(regs[0]), "=r"(regs[1]), "=r"(regs[2]), "=r"(regs[3])
                 : "r"(address)
                 : "memory");
}

// The same, each transposed.
__device__ __forceinline__ void load_transposed(u32 (&regs)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(regs[0]), "=r"(regs[1]), "=r"(regs[2]), "=r"(regs[3])
                 : "r"(address)
                 : "memory");
}

// c += a b, for 16 rows, 8 columns and 16 products each.
__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

constexpr u32 tile_bytes(u32 row, u32 column) { return (row * TILE_STRIDE + column) * u32(sizeof(bf16)); }

// c = left · rightᵀ: scores of 16 M rows of one tile, from `first` on, and 8 N rows of another.
template <u32 LEFT_ROWS, u32 M, u32 N>
__device__ __forceinline__ void multiply_rows(float (&c)[M][N][4], const bf16* left, u32 first, const bf16* right) {
    const u32 lane = threadIdx.x % WARP;
    const u32 from_left = shared_address(left + (first + lane % 16) * TILE_STRIDE + lane / 16 * 8);
    const u32 from_right = shared_address(right + (lane % 8 + lane / 16 * 8) * TILE_STRIDE + lane / 8 % 2 * 8);
#pragma unroll
    for (u32 m = 0; m < M; m++) {
#pragma unroll
        for (u32 n = 0; n < N; n++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) c[m][n][i] = 0.0f;
        }
    }
#pragma unroll
    for (u32 k = 0; k < HEAD_DIM; k += K_STEP) {
        u32 a[M][4];
#pragma unroll
        for (u32 m = 0; m < M; m++) load_matrices(a[m], from_left + tile_bytes(m * 16, k));
#pragma unroll
        for (u32 n = 0; n < N; n += 2) {
            u32 b[4];
            load_matrices(b, from_right + tile_bytes(n * 8, k));
#pragma unroll
            for (u32 m = 0; m < M; m++) {
                mma(c[m][n], a[m], b[0], b[1]);
                mma(c[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// c += weights · right, for the 8 N rows of a tile.
template <u32 M, u32 N>
__device__ __forceinline__ void multiply_columns(
    float (&c)[M][HEAD_DIM / 8][4], const Weights<M, N>& weights, const bf16* right) {
    const u32 lane = threadIdx.x % WARP;
    const u32 from_right = shared_address(right + lane % 16 * TILE_STRIDE + lane / 16 * 8);
#pragma unroll
    for (u32 k = 0; k < N / 2; k++) {
#pragma unroll
        for (u32 n = 0; n < HEAD_DIM / 8; n += 2) {
            u32 b[4];
            load_transposed(b, from_right + tile_bytes(k * K_STEP, n * 8));
#pragma unroll
            for (u32 m = 0; m < M; m++) {
                mma(c[m][n], weights.step[k][m], b[0], b[1]);
                mma(c[m][n + 1], weights.step[k][m], b[2], b[3]);
            }
        }
    }
}

// Products are finished when they have been multiplied.
template <u32 PENDING, u32 M, u32 N> __device__ __forceinline__ void finish_products(float (&)[M][N][4]) {}
