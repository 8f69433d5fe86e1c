// Tiles of bf16 rows between global memory, shared memory and accumulators. `place` says where the module's tiles have
// an element.

// Starts to copy rows of `from`, which lie `stride` elements apart, into a tile; zeros from row `there` on.
template <u32 ROWS, u32 THREADS>
__device__ __forceinline__ void load_tile(bf16* tile, const bf16* from, u64 stride, u32 there) {
    constexpr u32 PASS = THREADS / CHUNKS;
    constexpr u32 PASSES = (ROWS + PASS - 1) / PASS;
    const u32 first = threadIdx.x / CHUNKS, column = threadIdx.x % CHUNKS * CHUNK;
    if (THREADS % CHUNKS != 0 && first >= PASS) return;
#pragma unroll
    for (u32 pass = 0; pass < PASSES; pass++) {
        const u32 row = first + pass * PASS;
        if (ROWS % PASS == 0 || row < ROWS) {
            copy_16(tile + place<ROWS>(row, column), from + row * stride + column, row < there);
        }
    }
}

// Writes a warp's rows from `first` on, each times its factor, to a tile.
template <u32 ROWS, u32 M>
__device__ __forceinline__ void store_to_tile(
    bf16* tile, u32 first, const float (&c)[M][HEAD_DIM / 8][4], const float (&factor)[M][2]) {
    const u32 lane = threadIdx.x % WARP;
    __syncwarp();
#pragma unroll
    for (u32 m = 0; m < M; m++) {
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            const u32 row = first + m * 16 + half * 8 + lane / 4;
#pragma unroll
            for (u32 n = 0; n < HEAD_DIM / 8; n++) {
                const float* const pair = c[m][n] + half * 2;
                // Adding 0 makes zeros alike, whatever was added to them.
                const float low = fmaf(pair[0], factor[m][half], 0.0f), high = fmaf(pair[1], factor[m][half], 0.0f);
                *reinterpret_cast<u32*>(tile + place<ROWS>(row, n * 8 + lane % 4 * 2)) = pack_bf16(low, high);
            }
        }
    }
    __syncwarp();
}

// Copies a warp's COUNT rows of a tile from `first` on, as many of them as are `there`, to rows that lie `stride`
// elements apart.
template <u32 ROWS, u32 COUNT>
__device__ __forceinline__ void store_rows(bf16* to, u64 stride, const bf16* tile, u32 first, u32 there) {
    for (u32 chunk = threadIdx.x % WARP; chunk < COUNT * CHUNKS; chunk += WARP) {
        const u32 row = chunk / CHUNKS, column = chunk % CHUNKS * CHUNK;
        if (row < there) store_vec(to + row * stride + column, load_vec(tile + place<ROWS>(first + row, column)));
    }
}
