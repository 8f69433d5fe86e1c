// The nonlinearities of expert networks, of one number.

enum Kind : u32 { RELU, GELU, GELU_TANH };

constexpr float INV_SQRT_2 = 0.70710678f;
constexpr float TANH_SCALE = 0.7978846f;  // √(2/π)
constexpr float TANH_CUBIC = 0.044715f;

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }

__device__ __forceinline__ float activate(u32 kind, float x) {
    switch (kind) {
    case RELU: return x < 0.0f ? 0.0f : x;
    case GELU: return 0.5f * x * (1.0f + erff(x * INV_SQRT_2));
    default: return 0.5f * x * (1.0f + tanhf(TANH_SCALE * (x + TANH_CUBIC * x * x * x)));
    }
}
