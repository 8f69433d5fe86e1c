// Attention over pages of cached keys and values, what does not depend on how elements are stored.
//
// A token's result must not depend on how its sequence was cut into calls nor on what else is in the batch, so
// everything that is rounded is cut at fixed places: pages, and spans of pages from the start of the sequence that are
// merged in ascending order.

constexpr u32 PAGE_TOKENS = 64;
constexpr u32 SPAN_TOKENS = 8 * PAGE_TOKENS;
constexpr u32 NO_STATE = 0xffffffffu;

// Rows of a sequence and spans that they see. The rows of a sequence under a key-value head are its new tokens times
// the query heads that read it, the heads of a token one after another.
struct Task {
    // First of the sequence's tokens in the batch, tokens that the cache holds before, new tokens.
    u32 start, past, tokens;
    // First row, where the sequence's pages start in the table.
    u32 first, pages;
    u32 first_span, end_span;
    // Where the spans' sums are kept to be merged, or NO_STATE.
    u32 state;
};

// Sums over some keys for one row.
struct State {
    float largest, total;
};

// What earlier and later sums are multiplied by (Dao et al., "Flash-Decoding for long-context inference", 2023).
struct Merge {
    float keep, add;

    // Merges later sums into earlier ones. What has seen nothing changes no bit.
    __device__ __forceinline__ Merge(State& earlier, const State& later) {
        const float most = fmaxf(earlier.largest, later.largest);
        keep = earlier.largest == NONE ? 0.0f : exp2f(earlier.largest - most);
        add = later.largest == NONE ? 0.0f : exp2f(later.largest - most);
        earlier.largest = most;
        earlier.total = apply(earlier.total, later.total);
    }

    __device__ __forceinline__ float apply(float earlier, float later) const {
        return fmaf(later, add, earlier * keep);
    }
};

// Merges the sums that a task's spans left, for `rows` rows of a task; a warp has one row.
template <class T>
__device__ __forceinline__ void merge_spans(
    T* output, const float* sums, const State* states, const Task* tasks, u32 count, u32 rows, const Layout& layout) {
    const u32 index = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    const u32 row = index % rows, head_kv = index / rows % layout.heads_kv, number = index / rows / layout.heads_kv;
    if (number >= count) return;
    const Task task = tasks[number];
    const u32 group = layout.heads_q / layout.heads_kv, flat = task.first + row;
    if (flat >= task.tokens * group) return;
    const u32 token = task.start + flat / group, head = head_kv * group + flat % group;
    T* const to = output + (u64(token) * layout.heads_q + head) * layout.head_dim;
    for (u32 column = lane; column < layout.head_dim; column += WARP) {
        State merged = {NONE, 0.0f};
        float sum = 0.0f;
        for (u32 span = 0; span < task.end_span - task.first_span; span++) {
            const u64 from = (u64(task.state + span) * layout.heads_kv + head_kv) * rows + row;
            const Merge merge(merged, states[from]);
            sum = merge.apply(sum, sums[from * layout.head_dim + column]);
        }
        to[column] = from_float<T>(fmaf(sum, 1.0f / merged.total, 0.0f));
    }
}

// Copies new keys and values into their pages, of which `slots` names one for each row: [2 (keys, values), heads_kv,
// PAGE_TOKENS, head_dim] elements each. A block has one row; `words` are 32-bit words of a head.
extern "C" __global__ void paged_append(
    const u32* qkv, u32* cache, const uint2* slots, u32 heads_kv, u32 words, u32 row_words, u32 k_offset,
    u32 v_offset) {
    const uint2 slot = slots[blockIdx.x];
    const u64 page = slot.y / PAGE_TOKENS;
    for (u32 i = threadIdx.x; i < 2 * heads_kv * words; i += blockDim.x) {
        const u32 head = i / words % heads_kv, part = i / words / heads_kv, word = i % words;
        const u64 from = u64(slot.x) * row_words + (part == 0 ? k_offset : v_offset) + head * words + word;
        const u64 to = ((page * 2 + part) * heads_kv + head) * PAGE_TOKENS + slot.y % PAGE_TOKENS;
        cache[to * words + word] = qkv[from];
    }
}
