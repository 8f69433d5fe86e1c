// RMSNorm and LayerNorm over units: whole rows, or the heads inside them. A team of threads computes a unit: TEAM lanes
// of a warp, or the block (TEAM 0).

// Packs that a thread of the forward pass keeps in registers; longer units are read again.
constexpr u32 FORWARD_PACKS = 8;
constexpr u32 MAX_WARPS = 32;
constexpr u32 TILE = 32;  // columns, and rows at a time, of a block of column_sums

// Where units lie: `heads` units of `width` elements from `offset` on in each row of `stride` elements.
struct Units {
    u32 count, heads, width, offset, stride;

    __device__ u64 start(u32 unit) const { return u64(unit / heads) * stride + offset + unit % heads * width; }
};

// Sums each of `values` over the team, for all of its threads. All threads of the block take part.
template <u32 TEAM, u32 COUNT> __device__ __forceinline__ void team_sums(float (&values)[COUNT], float* scratch) {
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) {
#pragma unroll
        for (u32 offset = (TEAM ? TEAM : WARP) / 2; offset > 0; offset /= 2) {
            values[i] += __shfl_xor_sync(0xffffffffu, values[i], offset);
        }
    }
    if constexpr (TEAM == 0) {
        if (threadIdx.x % WARP == 0) {
#pragma unroll
            for (u32 i = 0; i < COUNT; i++) scratch[threadIdx.x / WARP * COUNT + i] = values[i];
        }
        __syncthreads();
#pragma unroll
        for (u32 i = 0; i < COUNT; i++) values[i] = 0.0f;
        for (u32 warp = 0; warp < blockDim.x / WARP; warp++) {
#pragma unroll
            for (u32 i = 0; i < COUNT; i++) values[i] += scratch[warp * COUNT + i];
        }
        __syncthreads();
    }
}

template <class T, u32 N, u32 TEAM, bool CENTERED>
__device__ __forceinline__ void norm_forward(
    const T* x, const float* __restrict__ weight, const float* __restrict__ bias, float eps, T* y, float* mean_out,
    float* inverse_out, Units units
) {
    __shared__ float scratch[MAX_WARPS];
    const u32 team = TEAM ? TEAM : blockDim.x;
    const u32 lane = threadIdx.x % team;
    const u32 unit = blockIdx.x * (blockDim.x / team) + threadIdx.x / team;
    const bool present = unit < units.count;
    const u32 packs = present ? units.width / N : 0;
    const u64 start = present ? units.start(unit) : 0;

    Pack<T, N> held[FORWARD_PACKS];
#pragma unroll
    for (u32 i = 0; i < FORWARD_PACKS; i++) {
        const u32 pack = lane + i * team;
        if (pack >= packs) break;
        held[i] = load_pack<N>(x + start + pack * N);
    }
    const auto each_pack = [&](auto use) {
#pragma unroll
        for (u32 i = 0; i < FORWARD_PACKS; i++) {
            const u32 pack = lane + i * team;
            if (pack >= packs) break;
            use(held[i], pack * N);
        }
        for (u32 pack = lane + FORWARD_PACKS * team; pack < packs; pack += team) {
            use(load_pack<N>(x + start + pack * N), pack * N);
        }
    };

    float mean = 0.0f;
    if constexpr (CENTERED) {
        float sum[1] = {0.0f};
        each_pack([&](const Pack<T, N>& pack, u32) {
#pragma unroll
            for (u32 i = 0; i < N; i++) sum[0] += pack.get(i);
        });
        team_sums<TEAM>(sum, scratch);
        mean = sum[0] / units.width;
    }
    float squares[1] = {0.0f};
    each_pack([&](const Pack<T, N>& pack, u32) {
#pragma unroll
        for (u32 i = 0; i < N; i++) {
            const float centered = pack.get(i) - mean;
            squares[0] += centered * centered;
        }
    });
    team_sums<TEAM>(squares, scratch);
    const float inverse = 1.0f / sqrtf(squares[0] / units.width + eps);

    if (present && lane == 0) {
        inverse_out[unit] = inverse;
        if constexpr (CENTERED) mean_out[unit] = mean;
    }
    each_pack([&](const Pack<T, N>& pack, u32 column) {
        const auto weights = load_pack<N>(weight + column);
        Pack<T, N> result;
        if constexpr (CENTERED) {
            const auto biases = load_pack<N>(bias + column);
#pragma unroll
            for (u32 i = 0; i < N; i++) result.set(i, (pack.get(i) - mean) * inverse * weights.get(i) + biases.get(i));
        } else {
#pragma unroll
            for (u32 i = 0; i < N; i++) result.set(i, pack.get(i) * inverse * weights.get(i));
        }
        store_pack(y + start + column, result);
    });
}

// Writes `sums` of this thread's columns to the block's row of `partials`, those of the block's teams added up in
// order.
template <u32 N, u32 TEAM, u32 PACKS>
__device__ __forceinline__ void store_partials(
    const float (&sums)[PACKS][N], u32 width, float* shared, float* partials
) {
    float* row = partials + u64(blockIdx.x) * width;
    if constexpr (TEAM == 0) {
#pragma unroll
        for (u32 p = 0; p < PACKS; p++) {
            const u32 column = (threadIdx.x + p * blockDim.x) * N;
#pragma unroll
            for (u32 i = 0; i < N; i++) {
                if (column + i < width) row[column + i] = sums[p][i];
            }
        }
    } else {
#pragma unroll
        for (u32 i = 0; i < N; i++) shared[threadIdx.x * N + i] = sums[0][i];
        __syncthreads();
        for (u32 column = threadIdx.x; column < width; column += blockDim.x) {
            float sum = 0.0f;
            for (u32 team = 0; team < blockDim.x / TEAM; team++) sum += shared[team * TEAM * N + column];
            row[column] = sum;
        }
        __syncthreads();
    }
}

// A thread holds PACKS packs of each of ROWS units, and the sums of as many packs of columns. `grad_x` may be `grad_y`
// where nothing is accumulated.
template <class T, u32 N, u32 TEAM, u32 PACKS, u32 ROWS, bool CENTERED>
__device__ __forceinline__ void norm_backward(
    const T* x, const float* __restrict__ weight, const float* means, const float* inverses, const T* grad_y,
    T* grad_x, u32 accumulate, float* weight_partials, float* bias_partials, Units units
) {
    static_assert(TEAM == 0 || PACKS == 1, "lanes of a warp hold one pack");
    constexpr u32 SUMS = CENTERED ? 2 * ROWS : ROWS;
    __shared__ float scratch[MAX_WARPS * SUMS];
    extern __shared__ float shared[];
    const u32 team = TEAM ? TEAM : blockDim.x;
    const u32 teams = blockDim.x / team;
    const u32 lane = threadIdx.x % team;
    const u32 packs = units.width / N;

    float weight_sums[PACKS][N] = {};
    float bias_sums[CENTERED ? PACKS : 1][N] = {};
    for (u32 first = blockIdx.x * teams * ROWS; first < units.count; first += gridDim.x * teams * ROWS) {
        Pack<T, N> xs[ROWS][PACKS], grads[ROWS][PACKS], residuals[ROWS][PACKS];
        u64 starts[ROWS];
        float mean[ROWS], inverse[ROWS];
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            const u32 unit = first + r * teams + threadIdx.x / team;
            const bool present = unit < units.count;
            starts[r] = present ? units.start(unit) : ~0ull;
            mean[r] = CENTERED && present ? means[unit] : 0.0f;
            inverse[r] = present ? inverses[unit] : 0.0f;
#pragma unroll
            for (u32 p = 0; p < PACKS; p++) {
                const u32 pack = lane + p * team;
                const bool inside = present && pack < packs;
                const u64 at = starts[r] + pack * N;
                xs[r][p] = inside ? load_pack<N>(x + at) : zero_pack<T, N>();
                grads[r][p] = inside ? load_pack<N>(grad_y + at) : zero_pack<T, N>();
                residuals[r][p] = inside && accumulate ? load_pack<N>(grad_x + at) : zero_pack<T, N>();
            }
        }

        // Sums over a unit of grad_y * weight * normalised x, then of grad_y * weight.
        float sums[SUMS] = {};
#pragma unroll
        for (u32 p = 0; p < PACKS; p++) {
            const u32 pack = lane + p * team;
            const auto weights = pack < packs ? load_pack<N>(weight + pack * N) : zero_pack<float, N>();
#pragma unroll
            for (u32 r = 0; r < ROWS; r++) {
#pragma unroll
                for (u32 i = 0; i < N; i++) {
                    const float normalised = (xs[r][p].get(i) - mean[r]) * inverse[r];
                    const float grad = grads[r][p].get(i);
                    weight_sums[p][i] += grad * normalised;
                    sums[r] += grad * weights.get(i) * normalised;
                    if constexpr (CENTERED) {
                        bias_sums[p][i] += grad;
                        sums[ROWS + r] += grad * weights.get(i);
                    }
                }
            }
        }
        team_sums<TEAM>(sums, scratch);

#pragma unroll
        for (u32 p = 0; p < PACKS; p++) {
            const u32 pack = lane + p * team;
            if (pack >= packs) continue;
            const auto weights = load_pack<N>(weight + pack * N);
#pragma unroll
            for (u32 r = 0; r < ROWS; r++) {
                if (starts[r] == ~0ull) continue;
                const float along = sums[r] / units.width;
                const float total = CENTERED ? sums[SUMS - ROWS + r] / units.width : 0.0f;
                Pack<T, N> result;
#pragma unroll
                for (u32 i = 0; i < N; i++) {
                    const float normalised = (xs[r][p].get(i) - mean[r]) * inverse[r];
                    const float slope = grads[r][p].get(i) * weights.get(i) - total - normalised * along;
                    result.set(i, residuals[r][p].get(i) + inverse[r] * slope);
                }
                store_pack(grad_x + starts[r] + pack * N, result);
            }
        }
    }
    store_partials<N, TEAM>(weight_sums, units.width, shared, weight_partials);
    if constexpr (CENTERED) store_partials<N, TEAM>(bias_sums, units.width, shared, bias_partials);
}

#define FORWARD(T, SUFFIX, N, TEAM)                                                                          \
    extern "C" __global__ void __launch_bounds__(512) rms_norm_forward_##SUFFIX##_##N##_##TEAM(              \
        const T* x, const float* __restrict__ weight, float eps, T* y, float* inverse, u32 count, u32 heads, \
        u32 width, u32 offset, u32 stride                                                                    \
    ) {                                                                                                      \
        norm_forward<T, N, TEAM, false>(                                                                     \
            x, weight, nullptr, eps, y, nullptr, inverse, Units{count, heads, width, offset, stride}         \
        );                                                                                                   \
    }
#define CENTERED_FORWARD(T, SUFFIX, N, TEAM)                                                                        \
    extern "C" __global__ void __launch_bounds__(512) layer_norm_forward_##SUFFIX##_##N##_##TEAM(                   \
        const T* x, const float* __restrict__ weight, const float* __restrict__ bias, float eps, T* y, float* mean, \
        float* inverse, u32 count, u32 width                                                                        \
    ) {                                                                                                             \
        norm_forward<T, N, TEAM, true>(x, weight, bias, eps, y, mean, inverse, Units{count, 1, width, 0, width});   \
    }
#define BACKWARD(T, SUFFIX, N, TEAM, PACKS, ROWS)                                                          \
    extern "C" __global__ void __launch_bounds__(512) rms_norm_backward_##SUFFIX##_##N##_##TEAM##_##PACKS( \
        const T* x, const float* __restrict__ weight, const float* inverse, const T* grad_y, T* grad_x,    \
        u32 accumulate, float* weight_partials, u32 count, u32 heads, u32 width, u32 offset, u32 stride    \
    ) {                                                                                                    \
        norm_backward<T, N, TEAM, PACKS, ROWS, false>(                                                     \
            x, weight, nullptr, inverse, grad_y, grad_x, accumulate, weight_partials, nullptr,             \
            Units{count, heads, width, offset, stride}                                                     \
        );                                                                                                 \
    }
#define CENTERED_BACKWARD(T, SUFFIX, N, TEAM, PACKS, ROWS)                                                      \
    extern "C" __global__ void __launch_bounds__(512) layer_norm_backward_##SUFFIX##_##N##_##TEAM##_##PACKS(    \
        const T* x, const float* __restrict__ weight, const float* mean, const float* inverse, const T* grad_y, \
        T* grad_x, float* weight_partials, float* bias_partials, u32 count, u32 width                           \
    ) {                                                                                                         \
        norm_backward<T, N, TEAM, PACKS, ROWS, true>(                                                           \
            x, weight, mean, inverse, grad_y, grad_x, 1, weight_partials, bias_partials,                        \
            Units{count, 1, width, 0, width}                                                                    \
        );                                                                                                      \
    }

// As many as fit into the registers.
#define ROWS(N) (N == 8 ? 2 : 4)
#define DEFINE(T, SUFFIX, N)               \
    FORWARD(T, SUFFIX, N, 8)               \
    FORWARD(T, SUFFIX, N, 16)              \
    FORWARD(T, SUFFIX, N, 32)              \
    FORWARD(T, SUFFIX, N, 0)               \
    CENTERED_FORWARD(T, SUFFIX, N, 32)     \
    CENTERED_FORWARD(T, SUFFIX, N, 0)      \
    BACKWARD(T, SUFFIX, N, 8, 1, ROWS(N))  \
    BACKWARD(T, SUFFIX, N, 16, 1, ROWS(N)) \
    BACKWARD(T, SUFFIX, N, 32, 1, ROWS(N)) \
    BACKWARD(T, SUFFIX, N, 0, 1, ROWS(N))  \
    CENTERED_BACKWARD(T, SUFFIX, N, 0, 1, ROWS(N))
FOR_EACH_PACK(DEFINE)

#define DEFINE_WIDE(T, SUFFIX, N, PACKS) \
    BACKWARD(T, SUFFIX, N, 0, PACKS, 1)  \
    CENTERED_BACKWARD(T, SUFFIX, N, 0, PACKS, 1)
DEFINE_WIDE(float, f32, 4, 4)
DEFINE_WIDE(float, f32, 1, 16)
DEFINE_WIDE(bf16, bf16, 8, 2)
DEFINE_WIDE(bf16, bf16, 1, 16)

// Sums of the columns of a block's `block_rows` rows of x, into (or with `accumulate` onto) row blockIdx.y of `out`.
// TILE * TILE threads.
template <class T>
__device__ __forceinline__ void column_sums(
    const T* x, u32 rows, u32 width, u32 block_rows, float* out, u32 accumulate
) {
    __shared__ float sums[TILE][TILE + 1];
    const u32 lane = threadIdx.x % TILE, group = threadIdx.x / TILE;
    const u32 column = blockIdx.x * TILE + lane;
    const u32 end = min(rows, (blockIdx.y + 1) * block_rows);
    float sum = 0.0f;
    if (column < width) {
#pragma unroll 8
        for (u32 row = blockIdx.y * block_rows + group; row < end; row += TILE) {
            sum += to_float(x[u64(row) * width + column]);
        }
    }
    sums[group][lane] = sum;
    __syncthreads();
    if (group == 0 && column < width) {
        float* total = out + u64(blockIdx.y) * width + column;
        float added = accumulate ? *total : 0.0f;
        for (u32 i = 0; i < TILE; i++) added += sums[i][lane];
        *total = added;
    }
}

extern "C" __global__ void column_sums_f32(
    const float* x, u32 rows, u32 width, u32 block_rows, float* out, u32 accumulate
) {
    column_sums(x, rows, width, block_rows, out, accumulate);
}
extern "C" __global__ void column_sums_bf16(
    const bf16* x, u32 rows, u32 width, u32 block_rows, float* out, u32 accumulate
) {
    column_sums(x, rows, width, block_rows, out, accumulate);
}
