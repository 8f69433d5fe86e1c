// Moving token rows into expert order and back, and the stable counting sort that says where they go.

constexpr u32 DROPPED = ~0u;
constexpr u32 ALL = 0xffffffffu;
constexpr u32 BLOCK_ITEMS = 1024;  // assignments of a block
constexpr u32 DIGITS = 1024;       // of a pass of a sort
constexpr u32 BATCH = 16;          // counters that a thread reads before it writes
constexpr u32 SLAB_PARTS = 2;      // parts of a gathered row's slab that a lane copies

// Assignments (tokens times slots) in chunks, each with whole blocks of its own.
struct Chunk {
    u32 first_item, end_item, first_block, first_row;
};
struct Chunks {
    u32 count, blocks;
    Chunk chunks[128];

    // The chunk that a block belongs to. Empty ones begin where the next does.
    __device__ __forceinline__ u32 of_block(u32 block) const {
        u32 chunk = 0;
        while (chunk + 1 < count && chunks[chunk + 1].first_block <= block) chunk++;
        return chunk;
    }
    __device__ __forceinline__ u32 first_item(u32 chunk, u32 block) const {
        return chunks[chunk].first_item + (block - chunks[chunk].first_block) * BLOCK_ITEMS;
    }
};

// Adds a block's assignments per expert to its chunk's, and those of slot 0 to the row behind the last chunk's. Shared:
// 2 * experts counters.
extern "C" __global__ void count_assignments(
    const u32* expert_index, u32 top_k, u32 experts, const __grid_constant__ Chunks chunks, u32* counts
) {
    extern __shared__ u32 shared[];
    for (u32 i = threadIdx.x; i < 2 * experts; i += blockDim.x) shared[i] = 0;
    __syncthreads();
    const u32 chunk = chunks.of_block(blockIdx.x);
    const u32 first = chunks.first_item(chunk, blockIdx.x);
    const u32 end = min(first + BLOCK_ITEMS, chunks.chunks[chunk].end_item);
    for (u32 item = first + threadIdx.x; item < end; item += blockDim.x) {
        atomicAdd(&shared[expert_index[item]], 1u);
        if (item % top_k == 0) atomicAdd(&shared[experts + expert_index[item]], 1u);
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < 2 * experts; i += blockDim.x) {
        const u32 row = i < experts ? chunk : chunks.count;
        if (shared[i] > 0) atomicAdd(&counts[row * experts + i % experts], shared[i]);
    }
}

// Assignments per block and expert. Shared: a counter per expert.
extern "C" __global__ void count_blocks(
    const u32* expert_index, u32 experts, const __grid_constant__ Chunks chunks, u32* block_counts
) {
    extern __shared__ u32 shared[];
    for (u32 i = threadIdx.x; i < experts; i += blockDim.x) shared[i] = 0;
    __syncthreads();
    const u32 chunk = chunks.of_block(blockIdx.x);
    const u32 first = chunks.first_item(chunk, blockIdx.x);
    const u32 end = min(first + BLOCK_ITEMS, chunks.chunks[chunk].end_item);
    for (u32 item = first + threadIdx.x; item < end; item += blockDim.x) atomicAdd(&shared[expert_index[item]], 1u);
    __syncthreads();
    for (u32 i = threadIdx.x; i < experts; i += blockDim.x) block_counts[blockIdx.x * experts + i] = shared[i];
}

// Turns the counts into each block's first row of each expert. A thread per chunk and expert.
extern "C" __global__ void start_blocks(
    u32 experts, const __grid_constant__ Chunks chunks, const u32* row_starts, u32* block_counts
) {
    const u32 chunk = thread_index() / experts, expert = thread_index() % experts;
    if (chunk >= chunks.count) return;
    const u32 end = chunk + 1 < chunks.count ? chunks.chunks[chunk + 1].first_block : chunks.blocks;
    u32 row = row_starts[chunk * experts + expert];
    for (u32 first = chunks.chunks[chunk].first_block; first < end; first += BATCH) {
        u32 counts[BATCH];
#pragma unroll
        for (u32 i = 0; i < BATCH; i++) counts[i] = first + i < end ? block_counts[(first + i) * experts + expert] : 0;
#pragma unroll
        for (u32 i = 0; i < BATCH; i++) {
            if (first + i < end) block_counts[(first + i) * experts + expert] = row;
            row += counts[i];
        }
    }
}

// Gives every assignment its row, in order. Shared: a counter per expert, for the block and for each of its warps.
extern "C" __global__ void place_rows(
    const u32* expert_index, u32 top_k, u32 experts, const __grid_constant__ Chunks chunks, const u32* block_starts,
    const u32* row_ends, u32* position, u32* token_of_row
) {
    extern __shared__ u32 shared[];
    u32* next = shared;
    u32* warp_counts = shared + experts;
    const u32 warps = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (u32 i = threadIdx.x; i < experts; i += blockDim.x) next[i] = block_starts[blockIdx.x * experts + i];
    for (u32 i = threadIdx.x; i < warps * experts; i += blockDim.x) warp_counts[i] = 0;
    __syncthreads();

    const u32 chunk = chunks.of_block(blockIdx.x);
    const u32 start = chunks.first_item(chunk, blockIdx.x);
    const u32 end = min(start + BLOCK_ITEMS, chunks.chunks[chunk].end_item);
    for (u32 first = start; first < end; first += blockDim.x) {
        const u32 item = first + threadIdx.x;
        const bool present = item < end;
        const u32 expert = present ? expert_index[item] : experts;
        const u32 alike = __match_any_sync(ALL, expert);
        const u32 rank = __popc(alike & ((1u << lane) - 1));  // among the warp's assignments to the expert
        const bool leads = present && rank == 0;
        if (leads) warp_counts[warp * experts + expert] = __popc(alike);
        __syncthreads();
        if (present) {
            u32 row = next[expert] + rank;
            for (u32 before = 0; before < warp; before++) row += warp_counts[before * experts + expert];
            const bool kept = row < row_ends[chunk * experts + expert];
            position[item] = kept ? row : DROPPED;
            if (kept) token_of_row[chunks.chunks[chunk].first_row + row] = item / top_k;
        }
        __syncthreads();
        if (leads) {
            atomicAdd(&next[expert], __popc(alike));
            warp_counts[warp * experts + expert] = 0;
        }
        __syncwarp();
    }
}

// A pass of a sort by DIGITS: the digits of the ids in the order so far (none: as they are).
extern "C" __global__ void sort_digits(const u32* ids, const u32* order, u32 shift, u32 count, u32* digits) {
    const u32 i = thread_index();
    if (i < count) digits[i] = ids[order ? order[i] : i] >> shift & (DIGITS - 1);
}

// Where the rows of each digit start and end. One block of DIGITS threads.
extern "C" __global__ void sort_starts(const u32* counts, u32* starts, u32* ends) {
    __shared__ u32 warps[WARP];
    const u32 lane = threadIdx.x % WARP;
    u32 sum = counts[threadIdx.x];
#pragma unroll
    for (u32 offset = 1; offset < WARP; offset *= 2) {
        const u32 before = __shfl_up_sync(ALL, sum, offset);
        if (lane >= offset) sum += before;
    }
    if (lane == WARP - 1) warps[threadIdx.x / WARP] = sum;
    __syncthreads();
    for (u32 warp = 0; warp < threadIdx.x / WARP; warp++) sum += warps[warp];
    starts[threadIdx.x] = sum - counts[threadIdx.x];
    ends[threadIdx.x] = sum;
}

// The order of this pass applied to the order so far.
extern "C" __global__ void sort_compose(const u32* order, const u32* pass, u32 count, u32* composed) {
    const u32 i = thread_index();
    if (i < count) composed[i] = order[pass[i]];
}

// Copies rows of `width` parts, each the bits of one access. A warp copies a slab of a row's columns, and the first
// slabs of all rows come before the second ones. A source row is read several times, for several experts: one slab of
// all source rows stays in the L2 cache for that, their whole rows would not. What is written leaves the cache first.
template <class Part>
__device__ __forceinline__ void gather_rows(
    const Part* source, const u32* index, u32 count, u32 width, Part* destination
) {
    const u32 row = thread_index() / WARP;
    if (row >= count) return;
    const u32 from = index[row];
    source += u64(from) * width;
    destination += u64(row) * width;
    const u32 first = blockIdx.y * SLAB_PARTS * WARP + threadIdx.x % WARP;
    Part held[SLAB_PARTS];
#pragma unroll
    for (u32 i = 0; i < SLAB_PARTS; i++) {
        const u32 column = first + i * WARP;
        held[i] = column < width && from != DROPPED ? source[column] : Part();
    }
#pragma unroll
    for (u32 i = 0; i < SLAB_PARTS; i++) {
        const u32 column = first + i * WARP;
        if (column < width) __stcs(destination + column, held[i]);
    }
}

#define GATHER_ROWS(PART, BYTES)                                                      \
    extern "C" __global__ void gather_rows_##BYTES(                                   \
        const PART* source, const u32* index, u32 count, u32 width, PART* destination \
    ) {                                                                               \
        gather_rows<PART>(source, index, count, width, destination);                  \
    }
GATHER_ROWS(uint4, 16)
GATHER_ROWS(u32, 4)
GATHER_ROWS(unsigned short, 2)

// Copies a row with a warp.
template <class T, u32 N> __device__ __forceinline__ void copy_row(const T* from, T* to, u32 width) {
    constexpr u32 HELD = 8;
    const u32 lane = threadIdx.x % WARP;
    for (u32 first = lane * N; first < width; first += HELD * WARP * N) {
        Pack<T, N> held[HELD];
#pragma unroll
        for (u32 i = 0; i < HELD; i++) {
            const u32 column = first + i * WARP * N;
            if (column >= width) break;
            held[i] = load_pack<N>(from + column);
        }
#pragma unroll
        for (u32 i = 0; i < HELD; i++) {
            const u32 column = first + i * WARP * N;
            if (column >= width) break;
            store_pack(to + column, held[i]);
        }
    }
}

// `blocks`: source row, destination row and number of rows, in the order of source rows.
template <class T, u32 N>
__device__ __forceinline__ void copy_blocks(
    const u32* blocks, u32 count, u32 total_rows, u32 width, const T* source, T* destination
) {
    const u32 at = thread_index() / WARP;
    if (at >= total_rows) return;
    const u32 row = blocks[0] + at;
    u32 low = 0, high = count;  // the last block that begins at the row or before
    while (high - low > 1) {
        const u32 middle = (low + high) / 2;
        if (blocks[3 * middle] <= row) low = middle;
        else high = middle;
    }
    const u32 to = blocks[3 * low + 1] + (row - blocks[3 * low]);
    copy_row<T, N>(source + u64(row) * width, destination + u64(to) * width, width);
}

// y = x + the sum of the token's rows, each times its weight, or without `gate_weight` as they are. A thread per pack;
// `y` may be `x`.
template <class T, u32 N>
__device__ __forceinline__ void combine_rows(
    const T* rows, const u32* position, const float* gate_weight, u32 top_k, const T* x, T* y, u32 row_packs,
    u32 packs
) {
    constexpr u32 HELD = 4;
    const u32 pack = thread_index();
    if (pack >= packs) return;
    const u32 token = pack / row_packs;
    const u64 width = row_packs * N, column = pack % row_packs * N;
    const auto before = load_pack<N>(x + u64(pack) * N);
    float sums[N];
#pragma unroll
    for (u32 i = 0; i < N; i++) sums[i] = before.get(i);
    position += u64(token) * top_k;
    if (gate_weight) gate_weight += u64(token) * top_k;
    for (u32 first = 0; first < top_k; first += HELD) {
        u32 places[HELD];
        float weights[HELD];
#pragma unroll
        for (u32 i = 0; i < HELD; i++) {
            const u32 slot = first + i;
            places[i] = slot < top_k ? position[slot] : DROPPED;
            weights[i] = slot < top_k && gate_weight ? gate_weight[slot] : 1.0f;
        }
        Pack<T, N> held[HELD];
#pragma unroll
        for (u32 i = 0; i < HELD; i++) {
            held[i] = places[i] == DROPPED ? zero_pack<T, N>() : load_pack<N>(rows + places[i] * width + column);
        }
#pragma unroll
        for (u32 i = 0; i < HELD; i++) {
#pragma unroll
            for (u32 j = 0; j < N; j++) sums[j] += held[i].get(j) * weights[i];
        }
    }
    Pack<T, N> result;
#pragma unroll
    for (u32 i = 0; i < N; i++) result.set(i, sums[i]);
    store_pack(y + u64(pack) * N, result);
}

// A warp per assignment.
template <class T, u32 N>
__device__ __forceinline__ void combine_backward(
    const T* grad, const T* rows, const u32* position, const float* gate_weight, u32 assignments, u32 top_k,
    u32 width, T* grad_rows, float* grad_gate_weight
) {
    constexpr u32 HELD = 4;
    const u32 assignment = thread_index() / WARP, lane = threadIdx.x % WARP;
    if (assignment >= assignments) return;
    const u32 row = position[assignment];
    if (row == DROPPED) {
        if (lane == 0) grad_gate_weight[assignment] = 0.0f;
        return;
    }
    const float weight = gate_weight[assignment];
    grad += u64(assignment / top_k) * width;
    rows += u64(row) * width;
    grad_rows += u64(row) * width;
    float dot = 0.0f;
    for (u32 first = lane * N; first < width; first += HELD * WARP * N) {
        Pack<T, N> grads[HELD], outputs[HELD];
#pragma unroll
        for (u32 i = 0; i < HELD; i++) {
            const u32 column = first + i * WARP * N;
            if (column >= width) break;
            grads[i] = load_pack<N>(grad + column);
            outputs[i] = load_pack<N>(rows + column);
        }
#pragma unroll
        for (u32 i = 0; i < HELD; i++) {
            const u32 column = first + i * WARP * N;
            if (column >= width) break;
            Pack<T, N> result;
#pragma unroll
            for (u32 j = 0; j < N; j++) {
                dot += grads[i].get(j) * outputs[i].get(j);
                result.set(j, grads[i].get(j) * weight);
            }
            store_pack(grad_rows + column, result);
        }
    }
    dot = warp_sum(dot);
    if (lane == 0) grad_gate_weight[assignment] = dot;
}

#define DEFINE(T, SUFFIX, N)                                                                                      \
    extern "C" __global__ void copy_blocks_##SUFFIX##_##N(                                                        \
        const u32* blocks, u32 count, u32 total_rows, u32 width, const T* source, T* destination                  \
    ) {                                                                                                           \
        copy_blocks<T, N>(blocks, count, total_rows, width, source, destination);                                 \
    }                                                                                                             \
    extern "C" __global__ void combine_rows_##SUFFIX##_##N(                                                       \
        const T* rows, const u32* position, const float* gate_weight, u32 top_k, const T* x, T* y, u32 row_packs, \
        u32 packs                                                                                                 \
    ) {                                                                                                           \
        combine_rows<T, N>(rows, position, gate_weight, top_k, x, y, row_packs, packs);                           \
    }                                                                                                             \
    extern "C" __global__ void combine_backward_##SUFFIX##_##N(                                                   \
        const T* grad, const T* rows, const u32* position, const float* gate_weight, u32 assignments, u32 top_k,  \
        u32 width, T* grad_rows, float* grad_gate_weight                                                          \
    ) {                                                                                                           \
        combine_backward<T, N>(                                                                                   \
            grad, rows, position, gate_weight, assignments, top_k, width, grad_rows, grad_gate_weight             \
        );                                                                                                        \
    }
FOR_EACH_PACK(DEFINE)
