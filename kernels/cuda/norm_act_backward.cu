// The gradients of norm_act from its input x: u = x − mean, k = rsqrt(var + eps).
#define NORMPASS_SITE NormSite
#include "backward.cuh"
