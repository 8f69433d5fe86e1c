// Operations on whole buffers, one pass each. `shift`: see flat_pack.

template <class T, u32 N> __device__ __forceinline__ void accumulate(float* y, const T* x, u64 len, u32 shift) {
    flat_pack<N>(len, shift, [&](u64 first, auto count) {
        constexpr u32 M = decltype(count)::VALUE;
        auto sum = load_pack<M>(y + first);
        const auto addend = load_pack<M>(x + first);
#pragma unroll
        for (u32 i = 0; i < M; i++) sum.set(i, sum.get(i) + addend.get(i));
        store_pack(y + first, sum);
    });
}

template <class T, u32 N> __device__ __forceinline__ void clamp(T* x, float limit, u64 len, u32 shift) {
    flat_pack<N>(len, shift, [&](u64 first, auto count) {
        constexpr u32 M = decltype(count)::VALUE;
        auto values = load_pack<M>(x + first);
#pragma unroll
        for (u32 i = 0; i < M; i++) {
            const float below = values.get(i) > limit ? limit : values.get(i);
            values.set(i, below < -limit ? -limit : below);
        }
        store_pack(x + first, values);
    });
}

template <class T, u32 N>
__device__ __forceinline__ void clamp_backward(const T* x, float limit, T* grad, u64 len, u32 shift) {
    flat_pack<N>(len, shift, [&](u64 first, auto count) {
        constexpr u32 M = decltype(count)::VALUE;
        const auto values = load_pack<M>(x + first);
        auto grads = load_pack<M>(grad + first);
#pragma unroll
        for (u32 i = 0; i < M; i++) grads.set(i, fabsf(values.get(i)) > limit ? 0.0f : grads.get(i));
        store_pack(grad + first, grads);
    });
}

template <class S, class D, u32 N> __device__ __forceinline__ void cast(const S* from, D* to, u64 len, u32 shift) {
    flat_pack<N>(len, shift, [&](u64 first, auto count) {
        constexpr u32 M = decltype(count)::VALUE;
        const auto values = load_pack<M>(from + first);
        Pack<D, M> result;
#pragma unroll
        for (u32 i = 0; i < M; i++) result.set(i, values.get(i));
        store_pack(to + first, result);
    });
}

#define DEFINE(T, SUFFIX, N)                                                                                         \
    extern "C" __global__ void accumulate_##SUFFIX##_##N(float* y, const T* x, u64 len, u32 shift) {                 \
        accumulate<T, N>(y, x, len, shift);                                                                          \
    }                                                                                                                \
    extern "C" __global__ void clamp_##SUFFIX##_##N(T* x, float limit, u64 len, u32 shift) {                         \
        clamp<T, N>(x, limit, len, shift);                                                                           \
    }                                                                                                                \
    extern "C" __global__ void clamp_backward_##SUFFIX##_##N(const T* x, float limit, T* grad, u64 len, u32 shift) { \
        clamp_backward<T, N>(x, limit, grad, len, shift);                                                            \
    }
FOR_EACH_PACK(DEFINE)

#define DEFINE_CAST(N)                                                                          \
    extern "C" __global__ void cast_f32_##N(const float* from, bf16* to, u64 len, u32 shift) {  \
        cast<float, bf16, N>(from, to, len, shift);                                             \
    }                                                                                           \
    extern "C" __global__ void cast_bf16_##N(const bf16* from, float* to, u64 len, u32 shift) { \
        cast<bf16, float, N>(from, to, len, shift);                                             \
    }
DEFINE_CAST(8)
DEFINE_CAST(1)
