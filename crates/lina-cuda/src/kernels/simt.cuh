// Products of f32 tiles by blocks of 16 x 16 threads. CAPACITY, the most elements that a head may have, is defined by
// the module.
//
// A tile is rows of CAPACITY elements, zero from head_dim on. Thread (y, x) has rows y R to y R + R of a product: of
// scores the columns x, x + 16 and so on, of sums over CAPACITY columns four from 4 x on, and from 64 later on, and so
// on.

constexpr u32 THREADS = 256;
// Rows of a thread in tiles of full height.
constexpr u32 ROWS = CAPACITY > 128 ? 2 : 4;
constexpr u32 TILE_ROWS = 16 * ROWS;
// Elements between rows in shared memory: four more than needed put the same columns of eight rows into different
// banks.
constexpr u32 TILE_STRIDE = CAPACITY + 4;
constexpr u32 WEIGHTS_STRIDE = TILE_ROWS + 4;
constexpr u32 VECTORS = CAPACITY / 64;

__device__ __forceinline__ u32 thread_x() { return threadIdx.x % 16; }
__device__ __forceinline__ u32 thread_y() { return threadIdx.x / 16; }

__device__ __forceinline__ float4 load_4(const float* from) { return *reinterpret_cast<const float4*>(from); }

// Copies rows, of which `row(index)` is the first element or null for zeros, into a tile.
template <u32 COUNT, class Row> __device__ __forceinline__ void load_tile(float* tile, u32 head_dim, Row row) {
    for (u32 i = threadIdx.x; i < COUNT * CAPACITY; i += THREADS) {
        const u32 index = i / CAPACITY, column = i % CAPACITY;
        const float* const from = row(index);
        tile[index * TILE_STRIDE + column] = from != nullptr && column < head_dim ? from[column] : 0.0f;
    }
}

// scores = left · rightᵀ, of 16 R rows and 16 C rows.
template <u32 R, u32 C>
__device__ __forceinline__ void multiply_rows(
    float (&scores)[R][C], const float* left, const float* right, u32 head_dim) {
#pragma unroll
    for (u32 r = 0; r < R; r++) {
#pragma unroll
        for (u32 c = 0; c < C; c++) scores[r][c] = 0.0f;
    }
    for (u32 d = 0; d < head_dim; d += 4) {
        float4 a[R];
#pragma unroll
        for (u32 r = 0; r < R; r++) a[r] = load_4(left + (thread_y() * R + r) * TILE_STRIDE + d);
#pragma unroll
        for (u32 c = 0; c < C; c++) {
            const float4 b = load_4(right + (thread_x() + 16 * c) * TILE_STRIDE + d);
#pragma unroll
            for (u32 r = 0; r < R; r++) {
                float sum = fmaf(a[r].x, b.x, scores[r][c]);
                sum = fmaf(a[r].y, b.y, sum);
                sum = fmaf(a[r].z, b.z, sum);
                scores[r][c] = fmaf(a[r].w, b.w, sum);
            }
        }
    }
}

// Shares a half warp's weights among its threads, through its rows of `shared`.
template <u32 R, u32 C> __device__ __forceinline__ void share_weights(float* shared, const float (&weights)[R][C]) {
    __syncwarp();
#pragma unroll
    for (u32 r = 0; r < R; r++) {
#pragma unroll
        for (u32 c = 0; c < C; c++) shared[(thread_y() * R + r) * WEIGHTS_STRIDE + thread_x() + 16 * c] = weights[r][c];
    }
    __syncwarp();
}

// sums += weights · right, for TILE_ROWS rows of `right`.
template <u32 R>
__device__ __forceinline__ void multiply_columns(float4 (&sums)[R][VECTORS], const float* weights, const float* right) {
    for (u32 k = 0; k < TILE_ROWS; k += 4) {
        float4 of_rows[R];
#pragma unroll
        for (u32 r = 0; r < R; r++) of_rows[r] = load_4(weights + (thread_y() * R + r) * WEIGHTS_STRIDE + k);
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
#pragma unroll
            for (u32 v = 0; v < VECTORS; v++) {
                const float4 b = load_4(right + (k + i) * TILE_STRIDE + v * 64 + thread_x() * 4);
#pragma unroll
                for (u32 r = 0; r < R; r++) {
                    const float4 of_row = of_rows[r];
                    const float weight = i == 0 ? of_row.x : i == 1 ? of_row.y : i == 2 ? of_row.z : of_row.w;
                    sums[r][v].x = fmaf(weight, b.x, sums[r][v].x);
                    sums[r][v].y = fmaf(weight, b.y, sums[r][v].y);
                    sums[r][v].z = fmaf(weight, b.z, sums[r][v].z);
                    sums[r][v].w = fmaf(weight, b.w, sums[r][v].w);
                }
            }
        }
    }
}

template <u32 R> __device__ __forceinline__ void clear(float4 (&sums)[R][VECTORS]) {
#pragma unroll
    for (u32 r = 0; r < R; r++) {
#pragma unroll
        for (u32 v = 0; v < VECTORS; v++) sums[r][v] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
}

// Writes the thread's part of a row, times `factor`.
__device__ __forceinline__ void store_row(float* to, const float4 (&sums)[VECTORS], float factor, u32 head_dim) {
#pragma unroll
    for (u32 v = 0; v < VECTORS; v++) {
        const float values[4] = {sums[v].x, sums[v].y, sums[v].z, sums[v].w};
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const u32 column = v * 64 + thread_x() * 4 + i;
            // Adding 0 makes zeros alike, whatever was added to them.
            if (column < head_dim) to[column] = fmaf(values[i], factor, 0.0f);
        }
    }
}

// What a thread knows of its rows' softmax: the largest score, to base 2, and its part of the sum of exponentials.
template <u32 R> struct Softmax {
    float largest[R], total[R];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (u32 r = 0; r < R; r++) {
            largest[r] = NONE;
            total[r] = 0.0f;
        }
    }

    // Turns scores into unnormalised probabilities and rescales what earlier keys left (Milakov & Gimelshein, "Online
    // normalizer calculation for softmax", 2018). `scale` is to base 2.
    template <u32 C>
    __device__ __forceinline__ void add(float (&scores)[R][C], float scale, float4 (&sums)[R][VECTORS]) {
#pragma unroll
        for (u32 r = 0; r < R; r++) {
            float most = NONE;
#pragma unroll
            for (u32 c = 0; c < C; c++) most = fmaxf(most, scores[r][c]);
#pragma unroll
            for (u32 offset = 8; offset > 0; offset /= 2) {
                most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, offset));
            }
            most = most == NONE ? largest[r] : fmaxf(largest[r], most * scale);
            const float keep = exp2f(largest[r] - most);
            largest[r] = most;
            // A row that has seen nothing yet has no largest score to go by.
            const float shift = most == NONE ? 0.0f : most;
            float sum = 0.0f;
#pragma unroll
            for (u32 c = 0; c < C; c++) {
                scores[r][c] = exp2f(fmaf(scores[r][c], scale, -shift));
                sum += scores[r][c];
            }
            total[r] = fmaf(total[r], keep, sum);
#pragma unroll
            for (u32 v = 0; v < VECTORS; v++) {
                sums[r][v].x *= keep;
                sums[r][v].y *= keep;
                sums[r][v].z *= keep;
                sums[r][v].w *= keep;
            }
        }
    }

    // The sum of exponentials of a row, from its sixteen threads.
    __device__ __forceinline__ float row_total(u32 r) const {
        float sum = total[r];
#pragma unroll
        for (u32 offset = 8; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        return sum;
    }
};
