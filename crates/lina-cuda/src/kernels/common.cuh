// What all kernels share: storage types, conversions, 16-byte accesses, sums over warps and blocks.

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 WARP = 32;

// The upper half of a float.
struct bf16 {
    unsigned short bits;
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(bf16 value) { return __uint_as_float(u32(value.bits) << 16); }

template <class T> __device__ __forceinline__ T from_float(float value);
template <> __device__ __forceinline__ float from_float<float>(float value) { return value; }
// Rounds to nearest, ties to even.
template <> __device__ __forceinline__ bf16 from_float<bf16>(float value) {
    bf16 rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(value));
    return rounded;
}

// Two floats as two bf16, the first in the lower half.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// What one 16-byte access moves.
template <class T> struct alignas(16) Vec {
    static constexpr u32 LEN = 16 / sizeof(T);
    T v[LEN];
};

template <class T> __device__ __forceinline__ Vec<T> load_vec(const T* from) {
    Vec<T> vec;
    *reinterpret_cast<uint4*>(&vec) = *reinterpret_cast<const uint4*>(from);
    return vec;
}

template <class T> __device__ __forceinline__ void store_vec(T* to, const Vec<T>& vec) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&vec);
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (u32 offset = WARP / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (u32 offset = WARP / 2; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
    return value;
}

// Sum over the block, for all threads; `scratch` has a float for each warp, and may be used again after this.
__device__ __forceinline__ float block_sum(float value, float* scratch) {
    value = warp_sum(value);
    const u32 warps = (blockDim.x + WARP - 1) / WARP;
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = value;
    __syncthreads();
    float sum = 0.0f;
    for (u32 warp = 0; warp < warps; warp++) sum += scratch[warp];
    __syncthreads();
    return sum;
}

// Maximum over the block, likewise.
__device__ __forceinline__ float block_max(float value, float* scratch) {
    value = warp_max(value);
    const u32 warps = (blockDim.x + WARP - 1) / WARP;
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = value;
    __syncthreads();
    float max = scratch[0];
    for (u32 warp = 1; warp < warps; warp++) max = fmaxf(max, scratch[warp]);
    __syncthreads();
    return max;
}
