// Causal attention of new tokens over pages of cached keys and values, on tensor cores for bf16.

// 16 rows for each of WARPS warps.
template <u32 WARPS>
__device__ __forceinline__ void attend(
    const bf16* qkv, const bf16* cache, bf16* output, float* kept_sums, State* kept_states, const Task* tasks,
    const u32* pages, const Layout& layout) {
    extern __shared__ __align__(16) bf16 shared[];
    constexpr u32 ROWS = WARPS * 16, BLOCK = WARPS * WARP, N = PAGE_TOKENS / 8, STAGE = TILE_ELEMENTS<PAGE_TOKENS>;
    bf16* const queries = shared;
    bf16* const stages = shared + TILE_ELEMENTS<ROWS>;

    const Task task = tasks[blockIdx.x / layout.heads_kv];
    // One of those that round the number of blocks up.
    if (task.tokens == 0) return;
    const u32 head_kv = blockIdx.x % layout.heads_kv;
    const u32 group = layout.heads_q / layout.heads_kv;
    const u32 rows = min(task.tokens * group - task.first, ROWS);
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const u32 window = layout.window;
    const float scale = layout.scale * LOG2_E;
    // Where a row of the block is among the rows of the batch, in heads.
    const auto position_of = [&](u32 row) { return task.past + (task.first + row) / group; };
    const auto head_of = [&](u32 row) { return head_kv * group + (task.first + row) % group; };
    const auto token_of = [&](u32 row) { return u64(task.start + (task.first + row) / group); };

    for (u32 chunk = threadIdx.x; chunk < ROWS * CHUNKS; chunk += BLOCK) {
        const u32 row = chunk / CHUNKS, column = chunk % CHUNKS * CHUNK;
        const bf16* const from = qkv + token_of(row) * layout.row_stride + layout.q_offset + head_of(row) * HEAD_DIM;
        copy_16(queries + place<ROWS>(row, column), from + column, row < rows);
    }
    const u32 end = min(position_of(rows - 1) + 1, task.end_span * SPAN_TOKENS);
    const u32 first_seen = first_key(position_of(0), window) / PAGE_TOKENS * PAGE_TOKENS;
    u32 key = max(first_seen, task.first_span * SPAN_TOKENS);
    const auto load = [&](u32 key, u32 stage) {
        const u64 page = pages[task.pages + key / PAGE_TOKENS];
        const bf16* const keys = cache + (page * 2 * layout.heads_kv + head_kv) * PAGE_TOKENS * HEAD_DIM;
        const bf16* const values = keys + u64(layout.heads_kv) * PAGE_TOKENS * HEAD_DIM;
        bf16* const to = stages + stage * 2 * STAGE;
        load_tile<PAGE_TOKENS, BLOCK>(to, keys, HEAD_DIM, end - key);
        load_tile<PAGE_TOKENS, BLOCK>(to + STAGE, values, HEAD_DIM, end - key);
    };
    load(key, 0);

    float merged[1][HEAD_DIM / 8][4], sums[1][HEAD_DIM / 8][4];
    clear(merged);
    clear(sums);
    State states[2] = {{NONE, 0.0f}, {NONE, 0.0f}};
    Softmax<1> softmax;
    softmax.clear();
    const u32 first = position_of(warp * 16), last = position_of(warp * 16 + 15);

    for (u32 stage = 0; key < end; key += PAGE_TOKENS, stage ^= 1) {
        finish_copies();
        __syncthreads();
        if (key + PAGE_TOKENS < end) load(key + PAGE_TOKENS, stage ^ 1);
        if (any_sees(first, last - first + 1, key, PAGE_TOKENS, window)) {
            const bf16* const step = stages + stage * 2 * STAGE;
            float scores[1][N][4];
            multiply_rows<ROWS>(scores, queries, warp * 16, step);
            if (!all_see(first, last - first + 1, key, PAGE_TOKENS, window)) {
#pragma unroll
                for (u32 n = 0; n < N; n++) {
#pragma unroll
                    for (u32 i = 0; i < 4; i++) {
                        const u32 position = position_of(warp * 16 + i / 2 * 8 + lane / 4);
                        if (!sees(position, key + n * 8 + lane % 4 * 2 + i % 2, window)) scores[0][n][i] = NONE;
                    }
                }
            }
            softmax.add(scores, scale, sums);
            const Weights<1, N> weights(scores);
            multiply_columns(sums, weights, step + STAGE);
        }
        if ((key + PAGE_TOKENS) % SPAN_TOKENS == 0 || key + PAGE_TOKENS >= end) {
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                const State span = {softmax.largest[0][half], softmax.row_total(0, half)};
                const Merge merge(states[half], span);
#pragma unroll
                for (u32 n = 0; n < HEAD_DIM / 8; n++) {
#pragma unroll
                    for (u32 i = half * 2; i < half * 2 + 2; i++) {
                        merged[0][n][i] = merge.apply(merged[0][n][i], sums[0][n][i]);
                    }
                }
            }
            softmax.clear();
            clear(sums);
        }
    }

    if (task.state != NO_STATE) {
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            const u32 row = warp * 16 + half * 8 + lane / 4;
            if (row >= rows) continue;
            const u64 to = (u64(task.state) * layout.heads_kv + head_kv) * ROWS + row;
            if (lane % 4 == 0) kept_states[to] = states[half];
#pragma unroll
            for (u32 n = 0; n < HEAD_DIM / 8; n++) {
                float* const pair = kept_sums + to * HEAD_DIM + n * 8 + lane % 4 * 2;
                *reinterpret_cast<float2*>(pair) = make_float2(merged[0][n][half * 2], merged[0][n][half * 2 + 1]);
            }
        }
        return;
    }
    const float factor[1][2] = {{1.0f / states[0].total, 1.0f / states[1].total}};
    store_to_tile<ROWS>(queries, warp * 16, merged, factor);
    for (u32 chunk = lane; chunk < 16 * CHUNKS; chunk += WARP) {
        const u32 row = warp * 16 + chunk / CHUNKS, column = chunk % CHUNKS * CHUNK;
        if (row < rows) {
            bf16* const to = output + (token_of(row) * layout.heads_q + head_of(row)) * HEAD_DIM;
            store_vec(to + column, load_vec(queries + place<ROWS>(row, column)));
        }
    }
}

// For a few rows of many sequences: blocks of 16 rows.
extern "C" __global__ void __launch_bounds__(WARP) paged_attention_few_bf16(
    const bf16* qkv, const bf16* cache, bf16* output, float* sums, State* states, const Task* tasks,
    const u32* pages, Layout layout) {
    attend<1>(qkv, cache, output, sums, states, tasks, pages, layout);
}

// For many rows of a sequence: blocks of 64 rows, which read keys and values once.
extern "C" __global__ void __launch_bounds__(4 * WARP, 2) paged_attention_many_bf16(
    const bf16* qkv, const bf16* cache, bf16* output, float* sums, State* states, const Task* tasks,
    const u32* pages, Layout layout) {
    attend<4>(qkv, cache, output, sums, states, tasks, pages, layout);
}

extern "C" __global__ void paged_merge_bf16(
    bf16* output, const float* sums, const State* states, const Task* tasks, u32 count, u32 rows, Layout layout) {
    merge_spans(output, sums, states, tasks, count, rows, layout);
}
