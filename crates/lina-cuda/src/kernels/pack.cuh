// Packs: neighbouring elements that a thread moves at once, in accesses of 16 bytes; single ones where data is not
// aligned for that.

template <class T, u32 N> struct Pack {
    static constexpr u32 LEN = Vec<T>::LEN;
    static_assert(N % LEN == 0, "a pack is made of 16-byte accesses");
    Vec<T> vecs[N / LEN];

    __device__ __forceinline__ float get(u32 i) const { return to_float(vecs[i / LEN].v[i % LEN]); }
    __device__ __forceinline__ void set(u32 i, float value) { vecs[i / LEN].v[i % LEN] = from_float<T>(value); }
};

template <class T> struct Pack<T, 1> {
    T element;

    __device__ __forceinline__ float get(u32) const { return to_float(element); }
    __device__ __forceinline__ void set(u32, float value) { element = from_float<T>(value); }
};

template <u32 N, class T> __device__ __forceinline__ Pack<T, N> load_pack(const T* from) {
    Pack<T, N> pack;
    if constexpr (N == 1) {
        pack.element = *from;
    } else {
#pragma unroll
        for (u32 i = 0; i < N / Vec<T>::LEN; i++) pack.vecs[i] = load_vec(from + i * Vec<T>::LEN);
    }
    return pack;
}

template <class T, u32 N> __device__ __forceinline__ void store_pack(T* to, const Pack<T, N>& pack) {
    if constexpr (N == 1) {
        *to = pack.element;
    } else {
#pragma unroll
        for (u32 i = 0; i < N / Vec<T>::LEN; i++) store_vec(to + i * Vec<T>::LEN, pack.vecs[i]);
    }
}

template <class T, u32 N> __device__ __forceinline__ Pack<T, N> zero_pack() {
    Pack<T, N> pack;
#pragma unroll
    for (u32 i = 0; i < N; i++) pack.set(i, 0.0f);
    return pack;
}

__device__ __forceinline__ u32 thread_index() { return blockIdx.x * blockDim.x + threadIdx.x; }

// A number of elements that the compiler knows.
template <u32 N> struct Count {
    static constexpr u32 VALUE = N;
};

// Gives this thread its N elements of a flat array, in which `shift` elements are missing before the first aligned
// pack: `use(first, Count<N>())`, or at the array's ends `use(element, Count<1>())` for each of those that are there.
template <u32 N, class Use> __device__ __forceinline__ void flat_pack(u64 len, u32 shift, Use use) {
    const u64 first = (u64(blockIdx.x) * blockDim.x + threadIdx.x) * N;
    if (first >= shift && first + N <= len + shift) {
        use(first - shift, Count<N>());
    } else {
#pragma unroll 1
        for (u32 i = 0; i < N; i++) {
            if (first + i >= shift && first + i < len + shift) use(first + i - shift, Count<1>());
        }
    }
}

// Storage types with their packs: DEFINE(type, name, elements of a pack).
#define FOR_EACH_PACK(DEFINE) DEFINE(float, f32, 4) DEFINE(float, f32, 1) DEFINE(bf16, bf16, 8) DEFINE(bf16, bf16, 1)
