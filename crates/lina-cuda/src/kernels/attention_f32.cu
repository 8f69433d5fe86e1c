// Causal grouped-query attention in tiles, for f32: the same scheme as the bf16 kernels, without tensor cores.

constexpr u32 TILE_ELEMENTS = TILE_ROWS * TILE_STRIDE;

// output: [tokens, heads_q * head_dim]; log_sum_exp: [heads_q, tokens].
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_forward_f32(const float* qkv, float* output, float* log_sum_exp, const Tile* tiles, Layout layout) {
    extern __shared__ float shared[];
    float* const queries = shared;
    float* const keys = queries + TILE_ELEMENTS;
    float* const values = keys + TILE_ELEMENTS;
    float* const weights = values + TILE_ELEMENTS;

    const Tile tile = tiles[blockIdx.x / layout.heads_q];
    const u32 head = blockIdx.x % layout.heads_q;
    const u32 head_kv = head / (layout.heads_q / layout.heads_kv);
    const u32 head_dim = layout.head_dim, window = layout.window;
    const u64 stride = layout.row_stride;
    const float* const sequence = qkv + tile.start * stride;
    const u32 end = min(tile.rows, tile.first + TILE_ROWS);
    const auto load = [&](float* to, u32 first, u32 offset) {
        load_tile<TILE_ROWS>(to, head_dim, [&](u32 row) {
            return first + row < end ? sequence + (first + row) * stride + offset : nullptr;
        });
    };
    load(queries, tile.first, layout.q_offset + head * head_dim);

    float4 sums[ROWS][VECTORS];
    clear(sums);
    Softmax<ROWS> softmax;
    softmax.clear();
    const u32 first_row = tile.first + thread_y() * ROWS;
    for (u32 key = first_key(tile.first, window) / TILE_ROWS * TILE_ROWS; key < end; key += TILE_ROWS) {
        __syncthreads();
        load(keys, key, layout.k_offset + head_kv * head_dim);
        load(values, key, layout.v_offset + head_kv * head_dim);
        __syncthreads();
        float scores[ROWS][ROWS];
        multiply_rows(scores, queries, keys, head_dim);
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
#pragma unroll
            for (u32 c = 0; c < ROWS; c++) {
                if (!sees(first_row + r, key + thread_x() + 16 * c, window)) scores[r][c] = NONE;
            }
        }
        softmax.add(scores, layout.scale * LOG2_E, sums);
        share_weights(weights, scores);
        multiply_columns(sums, weights, values);
    }

#pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
        const float total = softmax.row_total(r);
        const u64 token = tile.start + first_row + r;
        if (first_row + r >= tile.rows) continue;
        store_row(output + (token * layout.heads_q + head) * head_dim, sums[r], 1.0f / total, head_dim);
        if (thread_x() == 0) {
            log_sum_exp[u64(head) * layout.tokens + token] = (softmax.largest[r] + log2f(total)) * LN_2;
        }
    }
}

// along[head][token] = output · grad_output, for the softmax's gradient. A warp has one head of one token.
extern "C" __global__ void attention_along_f32(
    const float* output, const float* grad_output, float* along, Layout layout) {
    const u32 task = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    if (task >= layout.tokens * layout.heads_q) return;
    float sum = 0.0f;
    for (u32 d = lane; d < layout.head_dim; d += WARP) {
        const u64 index = u64(task) * layout.head_dim + d;
        sum = fmaf(output[index], grad_output[index], sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) along[u64(task % layout.heads_q) * layout.tokens + task / layout.heads_q] = sum;
}

// Overwrites the query part of grad_qkv. A block has a tile of queries under one head.
extern "C" __global__ void __launch_bounds__(THREADS) attention_grad_queries_f32(
    const float* qkv, const float* grad_output, const float* log_sum_exp, const float* along, float* grad_qkv,
    const Tile* tiles, Layout layout) {
    extern __shared__ float shared[];
    float* const queries = shared;
    float* const upstream = queries + TILE_ELEMENTS;
    float* const keys = upstream + TILE_ELEMENTS;
    float* const values = keys + TILE_ELEMENTS;
    float* const weights = values + TILE_ELEMENTS;

    const Tile tile = tiles[blockIdx.x / layout.heads_q];
    const u32 head = blockIdx.x % layout.heads_q;
    const u32 head_kv = head / (layout.heads_q / layout.heads_kv);
    const u32 head_dim = layout.head_dim, window = layout.window;
    const u64 stride = layout.row_stride, width = u64(layout.heads_q) * head_dim;
    const float* const sequence = qkv + tile.start * stride;
    const u32 end = min(tile.rows, tile.first + TILE_ROWS);
    const auto load = [&](float* to, u32 first, u32 offset) {
        load_tile<TILE_ROWS>(to, head_dim, [&](u32 row) {
            return first + row < end ? sequence + (first + row) * stride + offset : nullptr;
        });
    };
    const u32 query_offset = layout.q_offset + head * head_dim;
    load(queries, tile.first, query_offset);
    const float* const grads_of_head = grad_output + tile.start * width + head * head_dim;
    load_tile<TILE_ROWS>(upstream, head_dim, [&](u32 row) {
        return tile.first + row < end ? grads_of_head + (tile.first + row) * width : nullptr;
    });

    const u32 first_row = tile.first + thread_y() * ROWS;
    float largest[ROWS], inner[ROWS];
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
        const u64 index = u64(head) * layout.tokens + tile.start + first_row + r;
        const bool there = first_row + r < tile.rows;
        largest[r] = there ? log_sum_exp[index] * LOG2_E : 0.0f;
        inner[r] = there ? along[index] : 0.0f;
    }
    float4 sums[ROWS][VECTORS];
    clear(sums);
    for (u32 key = first_key(tile.first, window) / TILE_ROWS * TILE_ROWS; key < end; key += TILE_ROWS) {
        __syncthreads();
        load(keys, key, layout.k_offset + head_kv * head_dim);
        load(values, key, layout.v_offset + head_kv * head_dim);
        __syncthreads();
        float scores[ROWS][ROWS], grads[ROWS][ROWS];
        multiply_rows(scores, queries, keys, head_dim);
        multiply_rows(grads, upstream, values, head_dim);
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
#pragma unroll
            for (u32 c = 0; c < ROWS; c++) {
                const bool seen = sees(first_row + r, key + thread_x() + 16 * c, window);
                const float probability = seen ? exp2f(fmaf(scores[r][c], layout.scale * LOG2_E, -largest[r])) : 0.0f;
                grads[r][c] = probability * (grads[r][c] - inner[r]);
            }
        }
        share_weights(weights, grads);
        multiply_columns(sums, weights, keys);
    }
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
        if (first_row + r >= tile.rows) continue;
        float* const to = grad_qkv + (tile.start + first_row + r) * stride + query_offset;
        store_row(to, sums[r], layout.scale, head_dim);
    }
}

// Overwrites the key and value parts of grad_qkv. A block has a tile of keys under one key-value head, for all query
// heads that read it.
extern "C" __global__ void __launch_bounds__(THREADS) attention_grad_keys_f32(
    const float* qkv, const float* grad_output, const float* log_sum_exp, const float* along, float* grad_qkv,
    const Tile* tiles, Layout layout) {
    extern __shared__ float shared[];
    float* const keys = shared;
    float* const values = keys + TILE_ELEMENTS;
    float* const queries = values + TILE_ELEMENTS;
    float* const upstream = queries + TILE_ELEMENTS;
    float* const weights = upstream + TILE_ELEMENTS;

    const Tile tile = tiles[blockIdx.x / layout.heads_kv];
    const u32 head_kv = blockIdx.x % layout.heads_kv;
    const u32 group = layout.heads_q / layout.heads_kv;
    const u32 head_dim = layout.head_dim, window = layout.window;
    const u64 stride = layout.row_stride, width = u64(layout.heads_q) * head_dim;
    const float* const sequence = qkv + tile.start * stride;
    const auto load = [&](float* to, u32 first, u32 offset) {
        load_tile<TILE_ROWS>(to, head_dim, [&](u32 row) {
            return first + row < tile.rows ? sequence + (first + row) * stride + offset : nullptr;
        });
    };
    const u32 key_offset = layout.k_offset + head_kv * head_dim, value_offset = layout.v_offset + head_kv * head_dim;
    load(keys, tile.first, key_offset);
    load(values, tile.first, value_offset);

    const u32 first_row = tile.first + thread_y() * ROWS;
    const u32 end = tile.first + seeing_rows(tile.first, TILE_ROWS, tile.rows, window);
    float4 grad_keys[ROWS][VECTORS], grad_values[ROWS][VECTORS];
    clear(grad_keys);
    clear(grad_values);
    for (u32 head = head_kv * group; head < (head_kv + 1) * group; head++) {
        const float* const grads_of_head = grad_output + tile.start * width + head * head_dim;
        for (u32 query = tile.first; query < end; query += TILE_ROWS) {
            __syncthreads();
            load(queries, query, layout.q_offset + head * head_dim);
            load_tile<TILE_ROWS>(upstream, head_dim, [&](u32 row) {
                return query + row < tile.rows ? grads_of_head + (query + row) * width : nullptr;
            });
            __syncthreads();
            float probabilities[ROWS][ROWS], grads[ROWS][ROWS];
            multiply_rows(probabilities, keys, queries, head_dim);
            multiply_rows(grads, values, upstream, head_dim);
#pragma unroll
            for (u32 c = 0; c < ROWS; c++) {
                const u32 column = query + thread_x() + 16 * c;
                const u64 index = u64(head) * layout.tokens + tile.start + column;
                const bool there = column < tile.rows;
                const float largest = there ? log_sum_exp[index] * LOG2_E : 0.0f, inner = there ? along[index] : 0.0f;
#pragma unroll
                for (u32 r = 0; r < ROWS; r++) {
                    const bool seen = there && sees(column, first_row + r, window);
                    const float score = fmaf(probabilities[r][c], layout.scale * LOG2_E, -largest);
                    probabilities[r][c] = seen ? exp2f(score) : 0.0f;
                    grads[r][c] = probabilities[r][c] * (grads[r][c] - inner);
                }
            }
            share_weights(weights, probabilities);
            multiply_columns(grad_values, weights, upstream);
            share_weights(weights, grads);
            multiply_columns(grad_keys, weights, queries);
        }
    }
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
        if (first_row + r >= tile.rows) continue;
        float* const to = grad_qkv + (tile.start + first_row + r) * stride;
        store_row(to + key_offset, grad_keys[r], layout.scale, head_dim);
        store_row(to + value_offset, grad_values[r], 1.0f, head_dim);
    }
}
