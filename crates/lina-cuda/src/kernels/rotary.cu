// Rotary position embedding: element i of a head is rotated together with element i + half.

constexpr u32 HEADS = 4;  // heads of a row that a thread rotates by the same angles

template <class T, u32 N>
__device__ __forceinline__ void rotate(
    T* x, const float* table, const u32* positions, float direction, u32 rows, u32 heads, u32 half, u32 offset,
    u32 stride
) {
    const u32 packs = half / N;
    const u32 row = thread_index() / packs;
    const u32 column = thread_index() % packs * N;
    if (row >= rows) return;
    const float* angles = table + u64(positions[row]) * 2 * half + column;
    const auto cosines = load_pack<N>(angles);
    const auto sines = load_pack<N>(angles + half);

    const u32 first = blockIdx.y * HEADS;
    T* head = x + u64(row) * stride + offset + first * 2 * half + column;
    Pack<T, N> a[HEADS], b[HEADS];
#pragma unroll
    for (u32 i = 0; i < HEADS; i++) {
        if (first + i >= heads) break;
        a[i] = load_pack<N>(head + i * 2 * half);
        b[i] = load_pack<N>(head + i * 2 * half + half);
    }
#pragma unroll
    for (u32 i = 0; i < HEADS; i++) {
        if (first + i >= heads) break;
        Pack<T, N> rotated_a, rotated_b;
#pragma unroll
        for (u32 j = 0; j < N; j++) {
            const float sine = sines.get(j) * direction;
            rotated_a.set(j, a[i].get(j) * cosines.get(j) - b[i].get(j) * sine);
            rotated_b.set(j, b[i].get(j) * cosines.get(j) + a[i].get(j) * sine);
        }
        store_pack(head + i * 2 * half, rotated_a);
        store_pack(head + i * 2 * half + half, rotated_b);
    }
}

#define DEFINE(T, SUFFIX, N)                                                                                        \
    extern "C" __global__ void rotary_##SUFFIX##_##N(                                                               \
        T* x, const float* table, const u32* positions, float direction, u32 rows, u32 heads, u32 half, u32 offset, \
        u32 stride                                                                                                  \
    ) {                                                                                                             \
        rotate<T, N>(x, table, positions, direction, rows, heads, half, offset, stride);                            \
    }
FOR_EACH_PACK(DEFINE)
