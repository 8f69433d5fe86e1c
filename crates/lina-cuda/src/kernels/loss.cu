// Cross entropy of next-token predictions: a block per row, whose maximum and sum of exponentials are found in one
// pass.

constexpr u32 IGNORED = ~0u;
constexpr u32 BATCH = 4;  // packs that a thread reads before it uses them
constexpr u32 MAX_WARPS = 32;
constexpr float LOWEST = -3.402823466e38f;

// A row, whose first element may lie anywhere: `head` elements, `packs` aligned packs, and what is left from `tail` on.
template <class T> struct Row {
    T* logits;
    u32 vocabulary, head, packs, tail;

    __device__ Row(T* logits, u32 vocabulary) : logits(logits), vocabulary(vocabulary) {
        head = min(vocabulary, u32((16 - u64(logits) % 16) % 16 / sizeof(T)));
        packs = (vocabulary - head) / Vec<T>::LEN;
        tail = head + packs * Vec<T>::LEN;
    }

    // The element of this thread before the packs or, with `past`, behind them.
    __device__ bool single(bool past, u32& element) const {
        element = past ? tail + threadIdx.x : threadIdx.x;
        return element < (past ? vocabulary : head);
    }

    // Gives `use` this thread's packs and where they are from.
    template <class Use> __device__ __forceinline__ void each_pack(Use use) const {
        for (u32 first = threadIdx.x; first < packs; first += BATCH * blockDim.x) {
            decltype(load_vec(logits)) batch[BATCH];
#pragma unroll
            for (u32 i = 0; i < BATCH; i++) {
                const u32 pack = first + i * blockDim.x;
                if (pack < packs) batch[i] = load_vec(logits + head + pack * Vec<T>::LEN);
            }
#pragma unroll
            for (u32 i = 0; i < BATCH; i++) {
                const u32 pack = first + i * blockDim.x;
                if (pack < packs) use(batch[i], logits + head + pack * Vec<T>::LEN);
            }
        }
    }
};

// The largest of some numbers, and the sum of the exponentials of their distances to it.
struct Softmax {
    float largest = LOWEST, total = 0.0f;

    template <u32 COUNT> __device__ __forceinline__ void take(const float (&values)[COUNT]) {
        float most = values[0];
#pragma unroll
        for (u32 i = 1; i < COUNT; i++) most = fmaxf(most, values[i]);
        if (most > largest) {
            total *= __expf(largest - most);
            largest = most;
        }
#pragma unroll
        for (u32 i = 0; i < COUNT; i++) total += __expf(values[i] - largest);
    }
};

template <class T> __device__ __forceinline__ Softmax softmax(const Row<T>& row, float* scratch) {
    Softmax own;
    u32 element;
    for (u32 past = 0; past < 2; past++) {
        if (row.single(past, element)) own.take({to_float(row.logits[element])});
    }
    row.each_pack([&](const auto& pack, const T*) {
        float values[Vec<T>::LEN];
#pragma unroll
        for (u32 i = 0; i < Vec<T>::LEN; i++) values[i] = to_float(pack.v[i]);
        own.take(values);
    });
    Softmax all;
    all.largest = block_max(own.largest, scratch);
    all.total = block_sum(own.total * __expf(own.largest - all.largest), scratch);
    return all;
}

template <class T>
__device__ __forceinline__ void cross_entropy_forward(
    const T* logits, const u32* targets, u32 vocabulary, float* losses
) {
    __shared__ float scratch[MAX_WARPS];
    const u32 target = targets[blockIdx.x];
    if (target == IGNORED) {
        if (threadIdx.x == 0) losses[blockIdx.x] = 0.0f;
        return;
    }
    const Row<const T> row(logits + u64(blockIdx.x) * vocabulary, vocabulary);
    const Softmax all = softmax(row, scratch);
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(all.total) + (all.largest - to_float(row.logits[target]));
}

template <class T>
__device__ __forceinline__ void cross_entropy_forward_backward(
    T* logits, const u32* targets, u32 vocabulary, float scale, float* losses
) {
    __shared__ float scratch[MAX_WARPS];
    const Row<T> row(logits + u64(blockIdx.x) * vocabulary, vocabulary);
    const u32 target = targets[blockIdx.x];
    const bool ignored = target == IGNORED;
    float chosen = 0.0f;
    Softmax all;
    if (!ignored) {
        chosen = to_float(row.logits[target]);
        all = softmax(row, scratch);
    }
    const float factor = ignored ? 0.0f : scale / all.total;
    const auto gradient = [&](T logit) {
        return from_float<T>(ignored ? 0.0f : factor * __expf(to_float(logit) - all.largest));
    };
    u32 element;
    for (u32 past = 0; past < 2; past++) {
        if (row.single(past, element)) row.logits[element] = gradient(row.logits[element]);
    }
    row.each_pack([&](const Vec<T>& pack, T* at) {
        Vec<T> result;
#pragma unroll
        for (u32 i = 0; i < Vec<T>::LEN; i++) result.v[i] = gradient(pack.v[i]);
        store_vec(at, result);
    });
    __syncthreads();
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = ignored ? 0.0f : logf(all.total) + (all.largest - chosen);
        if (!ignored) row.logits[target] = from_float<T>(scale * (__expf(chosen - all.largest) / all.total - 1.0f));
    }
}

#define DEFINE(T, SUFFIX)                                                           \
    extern "C" __global__ void cross_entropy_forward_##SUFFIX(                      \
        const T* logits, const u32* targets, u32 vocabulary, float* losses          \
    ) {                                                                             \
        cross_entropy_forward(logits, targets, vocabulary, losses);                 \
    }                                                                               \
    extern "C" __global__ void cross_entropy_forward_backward_##SUFFIX(             \
        T* logits, const u32* targets, u32 vocabulary, float scale, float* losses   \
    ) {                                                                             \
        cross_entropy_forward_backward(logits, targets, vocabulary, scale, losses); \
    }
DEFINE(float, f32)
DEFINE(bf16, bf16)

// One block adds up `len` numbers, in double precision.
extern "C" __global__ void sum_into(const float* values, u32 len, float* out) {
    __shared__ double warps[MAX_WARPS];
    double sum = 0.0;
    for (u32 i = threadIdx.x; i < len; i += blockDim.x) sum += values[i];
#pragma unroll
    for (u32 offset = WARP / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (u32 warp = 1; warp < blockDim.x / WARP; warp++) sum += warps[warp];
        *out = float(sum);
    }
}
