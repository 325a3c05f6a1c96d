// result[i] = scale·i for the first `count` numbers: whether kernels compile, load, launch and get their arguments.
extern "C" __global__ void probe(double* result, double scale, long long count) {
  long long i = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
  if (i < count) result[i] = scale * static_cast<double>(i);
}
