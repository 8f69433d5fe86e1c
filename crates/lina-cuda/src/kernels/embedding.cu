// Token and learned position embeddings. Gradients of rows with one id are summed in the order of the rows: ids come
// sorted, and are cut into chunks that blocks sum; what belongs to an id of several chunks goes to `partials` first.

constexpr u32 CHUNK = 32;  // sorted ids of a block
constexpr u32 BATCH = 4;   // rows that a thread reads before it adds them

template <class T, u32 N, bool ADD>
__device__ __forceinline__ void embedding_forward(const T* table, const u32* ids, T* out, u32 row_packs, u32 packs) {
    const u32 pack = thread_index();
    if (pack >= packs) return;
    const u64 column = pack % row_packs * N;
    auto row = load_pack<N>(table + u64(ids[pack / row_packs]) * row_packs * N + column);
    T* at = out + u64(pack) * N;
    if constexpr (ADD) {
        const auto before = load_pack<N>(at);
#pragma unroll
        for (u32 i = 0; i < N; i++) row.set(i, before.get(i) + row.get(i));
    }
    store_pack(at, row);
}

// Adds `sums` to the table.
template <u32 N> __device__ __forceinline__ void add_to(float* table, const float (&sums)[N]) {
    auto total = load_pack<N>(table);
#pragma unroll
    for (u32 i = 0; i < N; i++) total.set(i, total.get(i) + sums[i]);
    store_pack(table, total);
}

// `order`: rows sorted by id; `ids`: of the rows, unsorted. `partials`: two rows per chunk: the sum for its first id if
// that has begun in a chunk before, and for its last id if that begins here and goes on in the next.
template <class T, u32 N>
__device__ __forceinline__ void embedding_backward(
    const T* grad, const u32* ids, const u32* order, u32 count, u32 padding, u32 width, float* table,
    float* partials
) {
    __shared__ u32 rows[CHUNK], sorted[CHUNK + 1];
    const u32 start = blockIdx.x * CHUNK;
    const u32 len = min(CHUNK, count - start);
    if (threadIdx.x <= len && start + threadIdx.x < count) {
        const u32 row = order[start + threadIdx.x];
        if (threadIdx.x < CHUNK) rows[threadIdx.x] = row;
        sorted[threadIdx.x] = ids[row];
    }
    __syncthreads();
    const u32 column = (blockIdx.y * blockDim.x + threadIdx.x) * N;
    if (column >= width) return;
    bool begun = start > 0 && ids[order[start - 1]] == sorted[0];  // the id at hand has rows in the chunk before

    float sums[N] = {};
    for (u32 first = 0; first < len; first += BATCH) {
        Pack<T, N> batch[BATCH];
#pragma unroll
        for (u32 i = 0; i < BATCH; i++) {
            if (first + i < len) batch[i] = load_pack<N>(grad + u64(rows[first + i]) * width + column);
        }
#pragma unroll
        for (u32 i = 0; i < BATCH; i++) {
            const u32 at = first + i;
            if (at >= len) break;
#pragma unroll
            for (u32 j = 0; j < N; j++) sums[j] += batch[i].get(j);
            const u32 id = sorted[at];
            const bool goes_on = start + at + 1 < count && sorted[at + 1] == id;
            if (goes_on && at + 1 < len) continue;
            if (id != padding) {
                if (begun || goes_on) {
                    Pack<float, N> partial;
#pragma unroll
                    for (u32 j = 0; j < N; j++) partial.set(j, sums[j]);
                    store_pack(partials + (u64(blockIdx.x) * 2 + (begun ? 0 : 1)) * width + column, partial);
                } else {
                    add_to(table + u64(id) * width + column, sums);
                }
            }
            begun = false;
#pragma unroll
            for (u32 j = 0; j < N; j++) sums[j] = 0.0f;
        }
    }
}

// A block per chunk: if its last id begins in it and goes on, adds up that id's partial sums in order.
template <u32 N>
__device__ __forceinline__ void embedding_spanning(
    const u32* ids, const u32* order, u32 count, u32 padding, u32 width, float* table, const float* partials
) {
    const u32 end = (blockIdx.x + 1) * CHUNK;
    const u32 column = (blockIdx.y * blockDim.x + threadIdx.x) * N;
    if (end >= count || column >= width) return;
    const u32 id = ids[order[end]];
    const bool begins_before = ids[order[end - CHUNK]] == id && end > CHUNK && ids[order[end - CHUNK - 1]] == id;
    if (id == padding || ids[order[end - 1]] != id || begins_before) return;

    float sums[N] = {};
    const auto take = [&](u64 row) {
        const auto partial = load_pack<N>(partials + row * width + column);
#pragma unroll
        for (u32 i = 0; i < N; i++) sums[i] += partial.get(i);
    };
    take(u64(blockIdx.x) * 2 + 1);
    for (u32 chunk = blockIdx.x + 1; chunk * CHUNK < count && ids[order[chunk * CHUNK]] == id; chunk++) {
        take(u64(chunk) * 2);
    }
    add_to(table + u64(id) * width + column, sums);
}

#define DEFINE(T, SUFFIX, N)                                                                                     \
    extern "C" __global__ void embedding_forward_##SUFFIX##_##N(                                                 \
        const T* table, const u32* ids, T* out, u32 row_packs, u32 packs                                         \
    ) {                                                                                                          \
        embedding_forward<T, N, false>(table, ids, out, row_packs, packs);                                       \
    }                                                                                                            \
    extern "C" __global__ void embedding_add_##SUFFIX##_##N(                                                     \
        const T* table, const u32* ids, T* out, u32 row_packs, u32 packs                                         \
    ) {                                                                                                          \
        embedding_forward<T, N, true>(table, ids, out, row_packs, packs);                                        \
    }                                                                                                            \
    extern "C" __global__ void embedding_backward_##SUFFIX##_##N(                                                \
        const T* grad, const u32* ids, const u32* order, u32 count, u32 padding, u32 width, float* table,        \
        float* partials                                                                                          \
    ) {                                                                                                          \
        embedding_backward<T, N>(grad, ids, order, count, padding, width, table, partials);                      \
    }                                                                                                            \
    extern "C" __global__ void embedding_spanning_##SUFFIX##_##N(                                                \
        const u32* ids, const u32* order, u32 count, u32 padding, u32 width, float* table, const float* partials \
    ) {                                                                                                          \
        embedding_spanning<N>(ids, order, count, padding, width, table, partials);                               \
    }
FOR_EACH_PACK(DEFINE)
