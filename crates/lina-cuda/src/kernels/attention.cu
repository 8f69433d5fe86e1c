// Causal grouped-query attention in tiles on tensor cores (Dao, "FlashAttention-2", 2023), for bf16. Sequences of any
// lengths share a launch: a tile is some rows of one of them, and a table lists all tiles, those with most work first.
//
// Gradients of queries have a kernel of their own that recomputes the scores: sums in arrival order would not repeat.

// Rows of the tables' tiles.
constexpr u32 BLOCK_ROWS = 128;
constexpr u32 QUERY_THREADS = BLOCK_ROWS / (16 * QUERY_PIECES) * WARP;
// Queries of a step of the keys' and values' gradients.
constexpr u32 KEY_QUERIES = 64;
constexpr u32 KEY_THREADS = BLOCK_ROWS / 16 * WARP;

// output: [tokens, heads_q * HEAD_DIM]; log_sum_exp: [heads_q, tokens].
extern "C" __global__ void __launch_bounds__(QUERY_THREADS, QUERY_BLOCKS)
    attention_forward_bf16(const bf16* qkv, bf16* output, float* log_sum_exp, const Tile* tiles, Layout layout) {
    extern __shared__ __align__(1024) bf16 shared[];
    constexpr u32 M = QUERY_PIECES, N = FORWARD_KEYS / 8, STAGE = TILE_ELEMENTS<FORWARD_KEYS>;
    bf16* const queries = shared;
    bf16* const stages = shared + TILE_ELEMENTS<BLOCK_ROWS>;

    const Tile tile = tiles[blockIdx.x / layout.heads_q];
    const u32 head = blockIdx.x % layout.heads_q;
    const u32 head_kv = head / (layout.heads_q / layout.heads_kv);
    const u64 stride = layout.row_stride;
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const u32 warp_row = warp * M * 16, warp_first = tile.first + warp_row;
    const u32 unit_first = tile.first + warp_row / UNIT_ROWS<M> * UNIT_ROWS<M>;
    const u32 window = layout.window;
    const float scale = layout.scale * LOG2_E;

    const bf16* const sequence = qkv + tile.start * stride;
    const bf16* const keys = sequence + layout.k_offset + head_kv * HEAD_DIM;
    const bf16* const values = sequence + layout.v_offset + head_kv * HEAD_DIM;
    const u32 end = min(tile.rows, tile.first + BLOCK_ROWS);
    const auto load = [&](u32 key, u32 stage) {
        bf16* const to = stages + stage * 2 * STAGE;
        load_tile<FORWARD_KEYS, QUERY_THREADS>(to, keys + key * stride, stride, end - key);
        load_tile<FORWARD_KEYS, QUERY_THREADS>(to + STAGE, values + key * stride, stride, end - key);
    };

    u32 key = first_key(tile.first, window) / FORWARD_KEYS * FORWARD_KEYS;
    const bf16* const from = sequence + tile.first * stride + layout.q_offset + head * HEAD_DIM;
    load_tile<BLOCK_ROWS, QUERY_THREADS>(queries, from, stride, tile.rows - tile.first);
    load(key, 0);

    float sums[M][HEAD_DIM / 8][4];
    clear(sums);
    Softmax<M> softmax;
    softmax.clear();

    for (u32 stage = 0; key < end; key += FORWARD_KEYS, stage ^= 1) {
        finish_copies();
        __syncthreads();
        if (key + FORWARD_KEYS < end) load(key + FORWARD_KEYS, stage ^ 1);
        if (!any_sees(unit_first, UNIT_ROWS<M>, key, FORWARD_KEYS, window)) continue;

        const bf16* const step = stages + stage * 2 * STAGE;
        float scores[M][N][4];
        multiply_rows<BLOCK_ROWS>(scores, queries, warp_row, step);
        finish_products<0>(scores);
        if (!all_see(warp_first, M * 16, key, FORWARD_KEYS, window)) {
            mask<false, M, N>(scores, warp_first + lane / 4, key + lane % 4 * 2, window);
        }
        softmax.add(scores, scale, sums);
        const Weights<M, N> weights(scores);
        multiply_columns(sums, weights, step + STAGE);
        finish_products<0>(sums);
    }

    float factor[M][2];
#pragma unroll
    for (u32 m = 0; m < M; m++) {
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            const float sum = softmax.row_total(m, half);
            const u32 query = warp_first + m * 16 + half * 8 + lane / 4;
            if (lane % 4 == 0 && query < tile.rows) {
                const u64 index = u64(head) * layout.tokens + tile.start + query;
                log_sum_exp[index] = (softmax.largest[m][half] + log2f(sum)) * LN_2;
            }
            factor[m][half] = 1.0f / sum;
        }
    }
    // Another warp's products may still read the tile.
    __syncthreads();
    store_to_tile<BLOCK_ROWS>(queries, warp_row, sums, factor);
    if (warp_first < tile.rows) {
        const u64 width = u64(layout.heads_q) * HEAD_DIM;
        bf16* const to = output + (tile.start + warp_first) * width + head * HEAD_DIM;
        store_rows<BLOCK_ROWS, M * 16>(to, width, queries, warp_row, tile.rows - warp_first);
    }
}

// along[head][token] = output · grad_output, for the softmax's gradient. A warp has one head of one token.
extern "C" __global__ void attention_along_bf16(
    const bf16* output, const bf16* grad_output, float* along, Layout layout) {
    const u32 task = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    if (task >= layout.tokens * layout.heads_q) return;
    float sum = 0.0f;
    for (u32 chunk = lane; chunk < CHUNKS; chunk += WARP) {
        const u64 offset = u64(task) * HEAD_DIM + chunk * CHUNK;
        const Vec<bf16> left = load_vec(output + offset), right = load_vec(grad_output + offset);
#pragma unroll
        for (u32 i = 0; i < CHUNK; i++) sum = fmaf(to_float(left.v[i]), to_float(right.v[i]), sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) along[u64(task % layout.heads_q) * layout.tokens + task / layout.heads_q] = sum;
}

// Turns scores into probabilities. `log_sum_exp(m, n, i)` is an element's query's, to base 2.
template <u32 M, u32 N, class LogSumExp>
__device__ __forceinline__ void softmax_again(float (&scores)[M][N][4], float scale, LogSumExp log_sum_exp) {
#pragma unroll
    for (u32 m = 0; m < M; m++) {
#pragma unroll
        for (u32 n = 0; n < N; n++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                scores[m][n][i] = exp2_fast(fmaf(scores[m][n][i], scale, -log_sum_exp(m, n, i)));
            }
        }
    }
}

// Turns gradients of probabilities into those of scores. `along(m, n, i)` is an element's query's.
template <u32 M, u32 N, class Along>
__device__ __forceinline__ void softmax_backward(
    float (&grads)[M][N][4], const float (&probabilities)[M][N][4], Along along) {
#pragma unroll
    for (u32 m = 0; m < M; m++) {
#pragma unroll
        for (u32 n = 0; n < N; n++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) grads[m][n][i] = probabilities[m][n][i] * (grads[m][n][i] - along(m, n, i));
        }
    }
}

// Overwrites the query part of grad_qkv. A block has a tile of queries under one head.
extern "C" __global__ void __launch_bounds__(QUERY_THREADS, QUERY_BLOCKS) attention_grad_queries_bf16(
    const bf16* qkv, const bf16* grad_output, const float* log_sum_exp, const float* along, bf16* grad_qkv,
    const Tile* tiles, Layout layout) {
    extern __shared__ __align__(1024) bf16 shared[];
    constexpr u32 M = QUERY_PIECES, N = QUERY_KEYS / 8, STAGE = TILE_ELEMENTS<QUERY_KEYS>;
    bf16* const queries = shared;
    bf16* const upstream = shared + TILE_ELEMENTS<BLOCK_ROWS>;
    bf16* const stages = shared + 2 * TILE_ELEMENTS<BLOCK_ROWS>;

    const Tile tile = tiles[blockIdx.x / layout.heads_q];
    const u32 head = blockIdx.x % layout.heads_q;
    const u32 head_kv = head / (layout.heads_q / layout.heads_kv);
    const u64 stride = layout.row_stride, width = u64(layout.heads_q) * HEAD_DIM;
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const u32 warp_row = warp * M * 16, warp_first = tile.first + warp_row;
    const u32 unit_first = tile.first + warp_row / UNIT_ROWS<M> * UNIT_ROWS<M>;
    const u32 window = layout.window;

    const bf16* const sequence = qkv + tile.start * stride;
    const bf16* const keys = sequence + layout.k_offset + head_kv * HEAD_DIM;
    const bf16* const values = sequence + layout.v_offset + head_kv * HEAD_DIM;
    const u32 end = min(tile.rows, tile.first + BLOCK_ROWS);
    const auto load = [&](u32 key, u32 stage) {
        bf16* const to = stages + stage * 2 * STAGE;
        load_tile<QUERY_KEYS, QUERY_THREADS>(to, keys + key * stride, stride, end - key);
        load_tile<QUERY_KEYS, QUERY_THREADS>(to + STAGE, values + key * stride, stride, end - key);
    };

    u32 key = first_key(tile.first, window) / QUERY_KEYS * QUERY_KEYS;
    const u64 first_row = tile.start + tile.first;
    const u32 there = tile.rows - tile.first;
    const u64 query_offset = layout.q_offset + head * HEAD_DIM;
    load_tile<BLOCK_ROWS, QUERY_THREADS>(queries, qkv + first_row * stride + query_offset, stride, there);
    load_tile<BLOCK_ROWS, QUERY_THREADS>(upstream, grad_output + first_row * width + head * HEAD_DIM, width, there);
    load(key, 0);

    float2 statistics[M][2];
#pragma unroll
    for (u32 m = 0; m < M; m++) {
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            const u32 query = warp_first + m * 16 + half * 8 + lane / 4;
            const u64 index = u64(head) * layout.tokens + tile.start + query;
            statistics[m][half] =
                query < tile.rows ? make_float2(log_sum_exp[index] * LOG2_E, along[index]) : make_float2(0.0f, 0.0f);
        }
    }
    float sums[M][HEAD_DIM / 8][4];
    clear(sums);

    for (u32 stage = 0; key < end; key += QUERY_KEYS, stage ^= 1) {
        finish_copies();
        __syncthreads();
        if (key + QUERY_KEYS < end) load(key + QUERY_KEYS, stage ^ 1);
        if (!any_sees(unit_first, UNIT_ROWS<M>, key, QUERY_KEYS, window)) continue;

        const bf16* const step = stages + stage * 2 * STAGE;
        float probabilities[M][N][4], grads[M][N][4];
        multiply_rows<BLOCK_ROWS>(probabilities, queries, warp_row, step);
        multiply_rows<BLOCK_ROWS>(grads, upstream, warp_row, step + STAGE);
        finish_products<1>(probabilities);
        if (!all_see(warp_first, M * 16, key, QUERY_KEYS, window)) {
            mask<false, M, N>(probabilities, warp_first + lane / 4, key + lane % 4 * 2, window);
        }
        softmax_again(probabilities, layout.scale * LOG2_E, [&](u32 m, u32, u32 i) { return statistics[m][i / 2].x; });
        finish_products<0>(grads);
        softmax_backward(grads, probabilities, [&](u32 m, u32, u32 i) { return statistics[m][i / 2].y; });
        const Weights<M, N> weights(grads);
        multiply_columns(sums, weights, step);
        finish_products<0>(sums);
    }

    float factor[M][2];
#pragma unroll
    for (u32 m = 0; m < M; m++) factor[m][0] = factor[m][1] = layout.scale;
    // Another warp's products may still read the tile.
    __syncthreads();
    store_to_tile<BLOCK_ROWS>(queries, warp_row, sums, factor);
    if (warp_first < tile.rows) {
        bf16* const to = grad_qkv + (tile.start + warp_first) * stride + query_offset;
        store_rows<BLOCK_ROWS, M * 16>(to, stride, queries, warp_row, tile.rows - warp_first);
    }
}

// Overwrites the key and value parts of grad_qkv. A block has a tile of keys under one key-value head, for all query
// heads that read it.
extern "C" __global__ void __launch_bounds__(KEY_THREADS, 1) attention_grad_keys_bf16(
    const bf16* qkv, const bf16* grad_output, const float* log_sum_exp, const float* along, bf16* grad_qkv,
    const Tile* tiles, Layout layout) {
    extern __shared__ __align__(1024) bf16 shared[];
    constexpr u32 N = KEY_QUERIES / 8, STAGE = TILE_ELEMENTS<KEY_QUERIES>;
    bf16* const keys = shared;
    bf16* const values = shared + TILE_ELEMENTS<BLOCK_ROWS>;
    bf16* const stages = shared + 2 * TILE_ELEMENTS<BLOCK_ROWS>;
    float* const statistics = reinterpret_cast<float*>(stages + 4 * STAGE);

    const Tile tile = tiles[blockIdx.x / layout.heads_kv];
    const u32 head_kv = blockIdx.x % layout.heads_kv;
    const u32 group = layout.heads_q / layout.heads_kv;
    const u64 stride = layout.row_stride, width = u64(layout.heads_q) * HEAD_DIM;
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const u32 warp_row = warp * 16, warp_first = tile.first + warp_row;
    const u32 unit_first = tile.first + warp_row / UNIT_ROWS<1> * UNIT_ROWS<1>;
    const u32 window = layout.window;

    const u64 first_row = tile.start + tile.first;
    const u32 there = tile.rows - tile.first;
    const u64 key_offset = layout.k_offset + head_kv * HEAD_DIM, value_offset = layout.v_offset + head_kv * HEAD_DIM;
    load_tile<BLOCK_ROWS, KEY_THREADS>(keys, qkv + first_row * stride + key_offset, stride, there);
    load_tile<BLOCK_ROWS, KEY_THREADS>(values, qkv + first_row * stride + value_offset, stride, there);

    const u32 steps_of_head = (seeing_rows(tile.first, BLOCK_ROWS, tile.rows, window) + KEY_QUERIES - 1) / KEY_QUERIES;
    const u32 steps = steps_of_head * group;
    const auto load = [&](u32 step, u32 stage) {
        const u32 query = tile.first + step % steps_of_head * KEY_QUERIES;
        const u32 head = head_kv * group + step / steps_of_head;
        const u64 row = tile.start + query;
        const u32 there = tile.rows - query;
        bf16* const to = stages + stage * 2 * STAGE;
        const bf16* const from = qkv + row * stride + layout.q_offset + head * HEAD_DIM;
        load_tile<KEY_QUERIES, KEY_THREADS>(to, from, stride, there);
        load_tile<KEY_QUERIES, KEY_THREADS>(to + STAGE, grad_output + row * width + head * HEAD_DIM, width, there);
        if (threadIdx.x < 2 * KEY_QUERIES) {
            const u32 index = threadIdx.x % KEY_QUERIES;
            const float* const of_head = (threadIdx.x < KEY_QUERIES ? log_sum_exp : along) + u64(head) * layout.tokens;
            copy_4(statistics + stage * 2 * KEY_QUERIES + threadIdx.x, of_head + row + index, index < there);
        }
    };
    load(0, 0);

    float grad_keys[1][HEAD_DIM / 8][4], grad_values[1][HEAD_DIM / 8][4];
    clear(grad_keys);
    clear(grad_values);

    for (u32 step = 0; step < steps; step++) {
        const u32 stage = step % 2, query = tile.first + step % steps_of_head * KEY_QUERIES;
        finish_copies();
        __syncthreads();
        if (step + 1 < steps) load(step + 1, stage ^ 1);
        if (!any_sees(query, KEY_QUERIES, unit_first, UNIT_ROWS<1>, window)) continue;

        const bf16* const queries = stages + stage * 2 * STAGE;
        const bf16* const upstream = queries + STAGE;
        const float* const of_queries = statistics + stage * 2 * KEY_QUERIES + lane % 4 * 2;
        float probabilities[1][N][4], grads[1][N][4];
        multiply_rows<BLOCK_ROWS>(probabilities, keys, warp_row, queries);
        multiply_rows<BLOCK_ROWS>(grads, values, warp_row, upstream);
        finish_products<1>(probabilities);
        if (!all_see(query, KEY_QUERIES, warp_first, 16, window)) {
            mask<true, 1, N>(probabilities, query + lane % 4 * 2, warp_first + lane / 4, window);
        }
        softmax_again(probabilities, layout.scale * LOG2_E, [&](u32, u32 n, u32 i) {
            return of_queries[n * 8 + i % 2] * LOG2_E;
        });
        const Weights<1, N> weights(probabilities);
        finish_products<0>(grads);
        multiply_columns(grad_values, weights, upstream);
        softmax_backward(grads, probabilities, [&](u32, u32 n, u32 i) {
            return of_queries[KEY_QUERIES + n * 8 + i % 2];
        });
        const Weights<1, N> grad_weights(grads);
        multiply_columns(grad_keys, grad_weights, queries);
        finish_products<0>(grad_values);
        finish_products<0>(grad_keys);
    }

    const float scale[1][2] = {{layout.scale, layout.scale}}, one[1][2] = {{1.0f, 1.0f}};
    // Another warp's products may still read the tiles.
    __syncthreads();
    store_to_tile<BLOCK_ROWS>(keys, warp_row, grad_keys, scale);
    store_to_tile<BLOCK_ROWS>(values, warp_row, grad_values, one);
    if (warp_first < tile.rows) {
        bf16* const to = grad_qkv + (tile.start + warp_first) * stride;
        store_rows<BLOCK_ROWS, 16>(to + key_offset, stride, keys, warp_row, tile.rows - warp_first);
        store_rows<BLOCK_ROWS, 16>(to + value_offset, stride, values, warp_row, tile.rows - warp_first);
    }
}
