// Multiplicative noise that is a hash of where it belongs.

// The output function of SplitMix64 (Steele et al., 2014).
__device__ __forceinline__ u64 mix(u64 state) {
    u64 z = state + 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

template <class T, u32 N>
__device__ __forceinline__ void jitter(T* values, u32 width, float amplitude, u64 stream, u64 token_offset, u32 packs) {
    const u32 pack = thread_index();
    if (pack >= packs) return;
    const u32 row = pack / (width / N), column = pack % (width / N) * N;
    const u64 token = mix(stream ^ (token_offset + row));
    T* at = values + u64(row) * width + column;
    auto result = load_pack<N>(at);
#pragma unroll
    for (u32 i = 0; i < N; i++) {
        const float unit = float(u32(mix(token + column + i) >> 40)) / float(1u << 24);
        // Rounded after each step, as on a processor, not fused.
        const float factor = __fadd_rn(1.0f, __fmul_rn(amplitude, 2.0f * unit - 1.0f));
        result.set(i, __fmul_rn(result.get(i), factor));
    }
    store_pack(at, result);
}

#define DEFINE(T, SUFFIX, N)                                                           \
    extern "C" __global__ void jitter_##SUFFIX##_##N(                                  \
        T* values, u32 width, float amplitude, u64 stream, u64 token_offset, u32 packs \
    ) {                                                                                \
        jitter<T, N>(values, width, amplitude, stream, token_offset, packs);           \
    }
FOR_EACH_PACK(DEFINE)
