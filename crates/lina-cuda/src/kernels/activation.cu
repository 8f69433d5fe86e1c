// The nonlinearities of expert networks. A thread has a pack of one row.

constexpr float INV_SQRT_2_PI = 0.3989423f;

__device__ __forceinline__ float slope(u32 kind, float x) {
    switch (kind) {
    case RELU: return x > 0.0f ? 1.0f : 0.0f;
    case GELU: return 0.5f * (1.0f + erff(x * INV_SQRT_2)) + x * INV_SQRT_2_PI * expf(-0.5f * x * x);
    default: {
        const float tanh = tanhf(TANH_SCALE * (x + TANH_CUBIC * x * x * x));
        const float inner = TANH_SCALE * (1.0f + 3.0f * TANH_CUBIC * x * x);
        return 0.5f * (1.0f + tanh + x * (1.0f - tanh * tanh) * inner);
    }
    }
}

template <class T, u32 N>
__device__ __forceinline__ void swiglu_forward(const T* gate_up, T* hidden, u32 features, u32 packs) {
    const u32 pack = thread_index();
    if (pack >= packs) return;
    const u64 row = pack / (features / N), column = pack % (features / N) * N;
    const T* gates = gate_up + row * 2 * features + column;
    const auto gate = load_pack<N>(gates);
    const auto up = load_pack<N>(gates + features);
    Pack<T, N> result;
#pragma unroll
    for (u32 i = 0; i < N; i++) result.set(i, gate.get(i) * sigmoid(gate.get(i)) * up.get(i));
    store_pack(hidden + row * features + column, result);
}

template <class T, u32 N>
__device__ __forceinline__ void swiglu_backward(
    const T* gate_up, const T* grad_hidden, T* grad_gate_up, T* hidden, u32 features, u32 packs
) {
    const u32 pack = thread_index();
    if (pack >= packs) return;
    const u64 row = pack / (features / N), column = pack % (features / N) * N;
    const u64 first = row * 2 * features + column;
    const auto gate = load_pack<N>(gate_up + first);
    const auto up = load_pack<N>(gate_up + first + features);
    const auto grad = load_pack<N>(grad_hidden + row * features + column);
    Pack<T, N> grad_gate, grad_up, result;
#pragma unroll
    for (u32 i = 0; i < N; i++) {
        const float share = sigmoid(gate.get(i));
        const float silu = gate.get(i) * share;
        grad_up.set(i, grad.get(i) * silu);
        grad_gate.set(i, grad.get(i) * up.get(i) * (share + silu * (1.0f - share)));
        result.set(i, silu * up.get(i));
    }
    store_pack(grad_gate_up + first, grad_gate);
    store_pack(grad_gate_up + first + features, grad_up);
    if (hidden) store_pack(hidden + row * features + column, result);
}

template <class T, u32 N>
__device__ __forceinline__ void activation_forward(u32 kind, T* pre, const float* bias, T* y, u32 width, u32 packs) {
    const u32 pack = thread_index();
    if (pack >= packs) return;
    const u64 first = u64(pack) * N;
    auto x = load_pack<N>(pre + first);
    if (bias) {
        const auto biases = load_pack<N>(bias + pack % (width / N) * N);
#pragma unroll
        for (u32 i = 0; i < N; i++) x.set(i, x.get(i) + biases.get(i));
        store_pack(pre + first, x);
    }
    Pack<T, N> result;
#pragma unroll
    for (u32 i = 0; i < N; i++) result.set(i, activate(kind, x.get(i)));
    store_pack(y + first, result);
}

template <class T, u32 N>
__device__ __forceinline__ void activation_backward(u32 kind, const T* pre, const T* grad_y, T* grad_pre, u32 packs) {
    const u32 pack = thread_index();
    if (pack >= packs) return;
    const u64 first = u64(pack) * N;
    const auto x = load_pack<N>(pre + first);
    const auto grad = load_pack<N>(grad_y + first);
    Pack<T, N> result;
#pragma unroll
    for (u32 i = 0; i < N; i++) result.set(i, grad.get(i) * slope(kind, x.get(i)));
    store_pack(grad_pre + first, result);
}

template <class T, u32 N> __device__ __forceinline__ void add_bias(T* x, const float* bias, u32 width, u32 packs) {
    const u32 pack = thread_index();
    if (pack >= packs) return;
    auto values = load_pack<N>(x + u64(pack) * N);
    const auto biases = load_pack<N>(bias + pack % (width / N) * N);
#pragma unroll
    for (u32 i = 0; i < N; i++) values.set(i, values.get(i) + biases.get(i));
    store_pack(x + u64(pack) * N, values);
}

#define DEFINE(T, SUFFIX, N)                                                                                         \
    extern "C" __global__ void swiglu_forward_##SUFFIX##_##N(const T* gate_up, T* hidden, u32 features, u32 packs) { \
        swiglu_forward<T, N>(gate_up, hidden, features, packs);                                                      \
    }                                                                                                                \
    extern "C" __global__ void swiglu_backward_##SUFFIX##_##N(                                                       \
        const T* gate_up, const T* grad_hidden, T* grad_gate_up, T* hidden, u32 features, u32 packs                  \
    ) {                                                                                                              \
        swiglu_backward<T, N>(gate_up, grad_hidden, grad_gate_up, hidden, features, packs);                          \
    }                                                                                                                \
    extern "C" __global__ void activation_forward_##SUFFIX##_##N(                                                    \
        u32 kind, T* pre, const float* bias, T* y, u32 width, u32 packs                                              \
    ) {                                                                                                              \
        activation_forward<T, N>(kind, pre, bias, y, width, packs);                                                  \
    }                                                                                                                \
    extern "C" __global__ void activation_backward_##SUFFIX##_##N(                                                   \
        u32 kind, const T* pre, const T* grad_y, T* grad_pre, u32 packs                                              \
    ) {                                                                                                              \
        activation_backward<T, N>(kind, pre, grad_y, grad_pre, packs);                                               \
    }                                                                                                                \
    extern "C" __global__ void add_bias_##SUFFIX##_##N(T* x, const float* bias, u32 width, u32 packs) {              \
        add_bias<T, N>(x, bias, width, packs);                                                                       \
    }
FOR_EACH_PACK(DEFINE)
