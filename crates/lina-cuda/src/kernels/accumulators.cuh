// Sums that tensor cores leave in the registers of warps, and what attention does with them. HEAD_DIM is defined by the
// module.
//
// An accumulator c[m][n] holds 16 rows and 8 columns: lane l has columns 2 (l % 4) and the next of row l / 4 in
// c[m][n][0..2], and of row l / 4 + 8 in c[m][n][2..4]. Warps have 16 M rows each.

constexpr u32 K_STEP = 16;
constexpr u32 CHUNK = Vec<bf16>::LEN;
constexpr u32 CHUNKS = HEAD_DIM / CHUNK;

__device__ __forceinline__ u32 shared_address(const void* pointer) { return u32(__cvta_generic_to_shared(pointer)); }

// Starts to copy 16 bytes from global to shared memory, or zeros if they are not `there`.
__device__ __forceinline__ void copy_16(void* to, const void* from, bool there) {
    const u32 bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes));
}

// The same for 4 bytes.
__device__ __forceinline__ void copy_4(void* to, const void* from, bool there) {
    const u32 bytes = there ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes));
}

// 2^x.
__device__ __forceinline__ float exp2_fast(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}

// Weights of M times 16 rows and 8 N columns, rounded to bf16, as left operands of steps of 16 products.
template <u32 M, u32 N> struct Weights {
    u32 step[N / 2][M][4];

    __device__ __forceinline__ explicit Weights(const float (&weights)[M][N][4]) {
#pragma unroll
        for (u32 k = 0; k < N / 2; k++) {
#pragma unroll
            for (u32 m = 0; m < M; m++) {
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    const float* const pair = weights[m][2 * k + i / 2] + i % 2 * 2;
                    step[k][m][i] = pack_bf16(pair[0], pair[1]);
                }
            }
        }
    }
};

template <u32 M> __device__ __forceinline__ void clear(float (&c)[M][HEAD_DIM / 8][4]) {
#pragma unroll
    for (u32 m = 0; m < M; m++) {
#pragma unroll
        for (u32 n = 0; n < HEAD_DIM / 8; n++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) c[m][n][i] = 0.0f;
        }
    }
}

// Hides the scores of keys that their queries do not see. `query` and `key` are of the lane's first element; queries
// are the rows, or the columns if TRANSPOSED.
template <bool TRANSPOSED, u32 M, u32 N>
__device__ __forceinline__ void mask(float (&scores)[M][N][4], u32 query, u32 key, u32 window) {
#pragma unroll
    for (u32 m = 0; m < M; m++) {
#pragma unroll
        for (u32 n = 0; n < N; n++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                const u32 row = m * 16 + i / 2 * 8, column = n * 8 + i % 2;
                const bool seen = sees(query + (TRANSPOSED ? column : row), key + (TRANSPOSED ? row : column), window);
                if (!seen) scores[m][n][i] = NONE;
            }
        }
    }
}

// What a lane knows of its rows' softmax: the largest score, to base 2, and its part of the sum of exponentials.
template <u32 M> struct Softmax {
    float largest[M][2], total[M][2];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (u32 m = 0; m < M; m++) {
            largest[m][0] = largest[m][1] = NONE;
            total[m][0] = total[m][1] = 0.0f;
        }
    }

    // Turns scores into unnormalised probabilities and rescales what earlier keys left (Milakov & Gimelshein, "Online
    // normalizer calculation for softmax", 2018). `scale` is to base 2.
    template <u32 N>
    __device__ __forceinline__ void add(float (&scores)[M][N][4], float scale, float (&sums)[M][HEAD_DIM / 8][4]) {
#pragma unroll
        for (u32 m = 0; m < M; m++) {
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                float most = NONE;
#pragma unroll
                for (u32 n = 0; n < N; n++) {
                    most = fmaxf(most, fmaxf(scores[m][n][half * 2], scores[m][n][half * 2 + 1]));
                }
                most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
                most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
                most = most == NONE ? largest[m][half] : fmaxf(largest[m][half], most * scale);
                const float keep = exp2_fast(largest[m][half] - most);
                largest[m][half] = most;
                // A row that has seen nothing yet has no largest score to go by.
                const float shift = most == NONE ? 0.0f : most;
                float sum = 0.0f;
#pragma unroll
                for (u32 n = 0; n < N; n++) {
#pragma unroll
                    for (u32 i = half * 2; i < half * 2 + 2; i++) {
                        scores[m][n][i] = exp2_fast(fmaf(scores[m][n][i], scale, -shift));
                        sum += scores[m][n][i];
                    }
                }
                total[m][half] = fmaf(total[m][half], keep, sum);
#pragma unroll
                for (u32 n = 0; n < HEAD_DIM / 8; n++) {
                    sums[m][n][half * 2] *= keep;
                    sums[m][n][half * 2 + 1] *= keep;
                }
            }
        }
    }

    // The sum of exponentials of a row, from its four lanes.
    __device__ __forceinline__ float row_total(u32 m, u32 half) const {
        float sum = total[m][half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        return sum;
    }
};
