// Who sees whom in causal attention with a window, and how fused rows and tiles are described.

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
// The score of what is not seen: below all others, and 2 to its power is 0.
constexpr float NONE = -3.4028234e38f;

// Where queries, keys and values lie in rows of a fused buffer.
struct Layout {
    u32 tokens, heads_q, heads_kv, head_dim, row_stride, q_offset, k_offset, v_offset;
    // A token sees as many tokens, itself included.
    u32 window;
    float scale;
};

// Rows from `first` on, of a sequence of `rows` rows that starts at row `start`.
struct Tile {
    u32 start, rows, first;
};

__device__ __forceinline__ bool sees(u32 query, u32 key, u32 window) { return key <= query && query - key < window; }

// First key that a query sees.
__device__ __forceinline__ u32 first_key(u32 query, u32 window) { return query < window ? 0 : query - window + 1; }

// Whether one of these queries may see one of these keys.
__device__ __forceinline__ bool any_sees(u32 query, u32 queries, u32 key, u32 keys, u32 window) {
    return key < query + queries && first_key(query, window) < key + keys;
}

// Whether each of these queries sees each of these keys.
__device__ __forceinline__ bool all_see(u32 query, u32 queries, u32 key, u32 keys, u32 window) {
    return key + keys <= query + 1 && first_key(query + queries - 1, window) <= key;
}

// Rows from `first` on that see one of `keys` keys, of a sequence of `rows` rows that the keys are in.
__device__ __forceinline__ u32 seeing_rows(u32 first, u32 keys, u32 rows, u32 window) {
    const u32 there = rows - first, after = there - min(keys, there);
    return after < window ? there : there - after - 1 + window;
}
