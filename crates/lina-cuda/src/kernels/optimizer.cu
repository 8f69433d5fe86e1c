// AdamW in one pass, and sums of squares of many ranges at once.

struct Step {
    float beta1, beta2, epsilon, grad_scale;
    float keep;                     // 1 - learning rate * weight decay
    float rate;                     // learning rate / bias correction of the first moment
    float inverse_root_correction;  // 1 / √(bias correction of the second moment)
};

template <u32 N, bool COPY>
__device__ __forceinline__ void adamw(
    float* params, const float* grads, float* first_moments, float* second_moments, bf16* copy, const Step& step,
    u64 len, u32 shift
) {
    flat_pack<N>(len, shift, [&](u64 first, auto count) {
        constexpr u32 M = decltype(count)::VALUE;
        auto param = load_pack<M>(params + first);
        const auto gradient = load_pack<M>(grads + first);
        auto m = load_pack<M>(first_moments + first);
        auto v = load_pack<M>(second_moments + first);
#pragma unroll
        for (u32 i = 0; i < M; i++) {
            const float grad = gradient.get(i) * step.grad_scale;
            m.set(i, step.beta1 * m.get(i) + (1.0f - step.beta1) * grad);
            v.set(i, step.beta2 * v.get(i) + (1.0f - step.beta2) * grad * grad);
            const float root = sqrtf(v.get(i)) * step.inverse_root_correction + step.epsilon;
            param.set(i, param.get(i) * step.keep - step.rate * m.get(i) / root);
        }
        store_pack(params + first, param);
        store_pack(first_moments + first, m);
        store_pack(second_moments + first, v);
        if constexpr (COPY) {
            Pack<bf16, M> rounded;
#pragma unroll
            for (u32 i = 0; i < M; i++) rounded.set(i, param.get(i));
            store_pack(copy + first, rounded);
        }
    });
}

#define DEFINE(T, SUFFIX, N)                                                                             \
    extern "C" __global__ void adamw_##SUFFIX##_##N(                                                     \
        float* params, const float* grads, float* m, float* v, bf16* copy, Step step, u64 len, u32 shift \
    ) {                                                                                                  \
        adamw<N, sizeof(T) == 2>(params, grads, m, v, copy, step, len, shift);                           \
    }
FOR_EACH_PACK(DEFINE)

__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
    for (u32 offset = WARP / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

// A range of elements, and the blocks that sum it.
struct Range {
    u32 start_low, start_high, len_low, len_high, first_block;
};

// Each block sums the squares of at most `block_elements` elements of one range, four at a time where they are aligned.
extern "C" __global__ void sum_of_squares(
    const float* values, const Range* ranges, u32 count, u32 block_elements, double* partials
) {
    __shared__ double warps[WARP];
    u32 low = 0, high = count;  // the block's range is the last one whose blocks begin at it or before
    while (high - low > 1) {
        const u32 middle = (low + high) / 2;
        if (ranges[middle].first_block <= blockIdx.x) low = middle;
        else high = middle;
    }
    const Range range = ranges[low];
    const u64 len = u64(range.len_high) << 32 | range.len_low;
    const u64 skipped = u64(blockIdx.x - range.first_block) * block_elements;
    const float* from = values + (u64(range.start_high) << 32 | range.start_low) + skipped;
    const u32 elements = u32(min(len - skipped, u64(block_elements)));

    const u32 head = min(elements, u32((16 - u64(from) % 16) % 16 / sizeof(float)));
    const u32 packs = (elements - head) / 4;
    const u32 tail = head + packs * 4;
    double sum = 0.0;
    const auto take = [&](float value) { sum += double(value) * double(value); };
    if (threadIdx.x < head) take(from[threadIdx.x]);
#pragma unroll 4
    for (u32 pack = threadIdx.x; pack < packs; pack += blockDim.x) {
        const auto four = load_pack<4>(from + head + pack * 4);
        take(four.get(0));
        take(four.get(1));
        take(four.get(2));
        take(four.get(3));
    }
    if (threadIdx.x < elements - tail) take(from[tail + threadIdx.x]);

    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (u32 warp = 1; warp < blockDim.x / WARP; warp++) sum += warps[warp];
        partials[blockIdx.x] = sum;
    }
}

// A warp adds up the blocks of each range; those of the last end at `blocks`.
extern "C" __global__ void sum_of_partials(
    const double* partials, const Range* ranges, u32 count, u32 blocks, double* sums
) {
    const u32 range = thread_index() / WARP;
    if (range >= count) return;
    const u32 end = range + 1 < count ? ranges[range + 1].first_block : blocks;
    double sum = 0.0;
    for (u32 block = ranges[range].first_block + threadIdx.x % WARP; block < end; block += WARP) sum += partials[block];
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) sums[range] = sum;
}
