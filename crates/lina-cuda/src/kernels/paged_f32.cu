// Causal attention of new tokens over pages of cached keys and values, for f32.

// 16 R rows.
template <u32 R>
__device__ __forceinline__ void attend(
    const float* qkv, const float* cache, float* output, float* kept_sums, State* kept_states, const Task* tasks,
    const u32* pages, const Layout& layout) {
    extern __shared__ float shared[];
    float* const queries = shared;
    float* const keys = queries + 16 * R * TILE_STRIDE;
    float* const values = keys + TILE_ROWS * TILE_STRIDE;
    float* const weights = values + TILE_ROWS * TILE_STRIDE;

    const Task task = tasks[blockIdx.x / layout.heads_kv];
    // One of those that round the number of blocks up.
    if (task.tokens == 0) return;
    const u32 head_kv = blockIdx.x % layout.heads_kv;
    const u32 group = layout.heads_q / layout.heads_kv;
    const u32 head_dim = layout.head_dim, window = layout.window;
    const u32 rows = min(task.tokens * group - task.first, 16 * R);
    const auto position_of = [&](u32 row) { return task.past + (task.first + row) / group; };
    const auto head_of = [&](u32 row) { return head_kv * group + (task.first + row) % group; };
    const auto token_of = [&](u32 row) { return u64(task.start + (task.first + row) / group); };

    load_tile<16 * R>(queries, head_dim, [&](u32 row) {
        const u64 offset = token_of(row) * layout.row_stride + layout.q_offset + head_of(row) * head_dim;
        return row < rows ? qkv + offset : nullptr;
    });
    const u32 end = min(position_of(rows - 1) + 1, task.end_span * SPAN_TOKENS);
    const u32 first_seen = first_key(position_of(0), window) / PAGE_TOKENS * PAGE_TOKENS;

    float4 merged[R][VECTORS], sums[R][VECTORS];
    clear(merged);
    clear(sums);
    State states[R];
#pragma unroll
    for (u32 r = 0; r < R; r++) states[r] = {NONE, 0.0f};
    Softmax<R> softmax;
    softmax.clear();
    const u32 first_row = thread_y() * R;
    for (u32 key = max(first_seen, task.first_span * SPAN_TOKENS); key < end; key += TILE_ROWS) {
        const u64 page = pages[task.pages + key / PAGE_TOKENS];
        const float* const keys_of_head =
            cache + ((page * 2 * layout.heads_kv + head_kv) * PAGE_TOKENS + key % PAGE_TOKENS) * head_dim;
        const float* const values_of_head = keys_of_head + u64(layout.heads_kv) * PAGE_TOKENS * head_dim;
        __syncthreads();
        load_tile<TILE_ROWS>(keys, head_dim, [&](u32 row) {
            return key + row < end ? keys_of_head + row * head_dim : nullptr;
        });
        load_tile<TILE_ROWS>(values, head_dim, [&](u32 row) {
            return key + row < end ? values_of_head + row * head_dim : nullptr;
        });
        __syncthreads();
        float scores[R][ROWS];
        multiply_rows(scores, queries, keys, head_dim);
#pragma unroll
        for (u32 r = 0; r < R; r++) {
#pragma unroll
            for (u32 c = 0; c < ROWS; c++) {
                if (!sees(position_of(first_row + r), key + thread_x() + 16 * c, window)) scores[r][c] = NONE;
            }
        }
        softmax.add(scores, layout.scale * LOG2_E, sums);
        share_weights(weights, scores);
        multiply_columns(sums, weights, values);
        if ((key + TILE_ROWS) % SPAN_TOKENS == 0 || key + TILE_ROWS >= end) {
#pragma unroll
            for (u32 r = 0; r < R; r++) {
                const State span = {softmax.largest[r], softmax.row_total(r)};
                const Merge merge(states[r], span);
#pragma unroll
                for (u32 v = 0; v < VECTORS; v++) {
                    merged[r][v].x = merge.apply(merged[r][v].x, sums[r][v].x);
                    merged[r][v].y = merge.apply(merged[r][v].y, sums[r][v].y);
                    merged[r][v].z = merge.apply(merged[r][v].z, sums[r][v].z);
                    merged[r][v].w = merge.apply(merged[r][v].w, sums[r][v].w);
                }
            }
            softmax.clear();
            clear(sums);
        }
    }

#pragma unroll
    for (u32 r = 0; r < R; r++) {
        const u32 row = first_row + r;
        if (row >= rows) continue;
        if (task.state != NO_STATE) {
            const u64 to = (u64(task.state) * layout.heads_kv + head_kv) * 16 * R + row;
            if (thread_x() == 0) kept_states[to] = states[r];
            store_row(kept_sums + to * head_dim, merged[r], 1.0f, head_dim);
        } else {
            float* const to = output + (token_of(row) * layout.heads_q + head_of(row)) * head_dim;
            store_row(to, merged[r], 1.0f / states[r].total, head_dim);
        }
    }
}

// For a few rows of many sequences: blocks of 16 rows.
extern "C" __global__ void __launch_bounds__(THREADS) paged_attention_few_f32(
    const float* qkv, const float* cache, float* output, float* sums, State* states, const Task* tasks,
    const u32* pages, Layout layout) {
    attend<1>(qkv, cache, output, sums, states, tasks, pages, layout);
}

// For many rows of a sequence: blocks of TILE_ROWS rows, which read keys and values once.
extern "C" __global__ void __launch_bounds__(THREADS) paged_attention_many_f32(
    const float* qkv, const float* cache, float* output, float* sums, State* states, const Task* tasks,
    const u32* pages, Layout layout) {
    attend<ROWS>(qkv, cache, output, sums, states, tasks, pages, layout);
}

extern "C" __global__ void paged_merge_f32(
    float* output, const float* sums, const State* states, const Task* tasks, u32 count, u32 rows, Layout layout) {
    merge_spans(output, sums, states, tasks, count, rows, layout);
}
