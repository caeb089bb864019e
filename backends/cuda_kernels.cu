// Fused passes over products of queries with points, and over the few components that can matter.
//
// A logit is  scale p.v - curvature |v|^2 + log w  for a product p.v, and it is within
// slack (|v| + least) + last curvature (|v| + far)^2  of what exact arithmetic would give (device_tiles.py says why).
// A block works on SPAN columns of one row, or on one component of one query; nothing depends on the order in which
// blocks run, so results repeat to the last bit. Compiled without contraction: two-term sums need what is written.

#define THREADS 128
#define EACH 32
#define SPAN (THREADS * EACH)
#define SQUARES 3

typedef long long Index;

struct Law { double scale, curvature, slack, far; };

struct TwoTerms { double high, low; };

__device__ TwoTerms two_sum(double a, double b)
{
    double s = a + b, t = s - a;
    return {s, (a - (s - t)) + (b - t)};
}

__device__ TwoTerms two_product(double a, double b)
{
    double p = a * b;
    return {p, fma(a, b, -p)};
}

__device__ TwoTerms plus(TwoTerms a, TwoTerms b)
{
    TwoTerms s = two_sum(a.high, b.high);
    return two_sum(s.high, s.low + (a.low + b.low));
}

// |x - alpha y|^2 of one coordinate, to about twice the precision of a double
__device__ TwoTerms squared_residual(double x, double alpha, double y)
{
    TwoTerms product = two_product(alpha, y), r = two_sum(x, -product.high);
    r = two_sum(r.high, r.low - product.low);
    TwoTerms square = two_product(r.high, r.high);
    return two_sum(square.high, square.low + 2.0 * r.high * r.low);
}

__device__ double logit(Law law, double product, double norm, double log_weight)
{
    return law.scale * product - law.curvature * norm * norm + log_weight;
}

__device__ double error(Law law, double norm, double last, double least)
{
    double reach = norm + law.far;
    return law.slack * (norm + least) + last * law.curvature * reach * reach;
}

__device__ double larger(double a, double b) { return a > b ? a : b; }

__device__ double largest(double mine, double* shared)
{
    shared[threadIdx.x] = mine;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) shared[threadIdx.x] = larger(shared[threadIdx.x], shared[threadIdx.x + half]);
    }
    __syncthreads();
    return shared[0];
}

// The sum over threads, for thread 0: the others may see what it wrote for the next sum
__device__ double total(double mine, double* shared)
{
    shared[threadIdx.x] = mine;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    }
    __syncthreads();
    return shared[0];
}

// The sum over threads before this one, and over all of them
__device__ Index before(Index mine, Index* shared, Index* all)
{
    shared[threadIdx.x] = mine;
    __syncthreads();
    for (int step = 1; step < THREADS; step *= 2) {
        Index other = threadIdx.x >= step ? shared[threadIdx.x - step] : 0;
        __syncthreads();
        shared[threadIdx.x] += other;
        __syncthreads();
    }
    *all = shared[THREADS - 1];
    return shared[threadIdx.x] - mine;
}

// tops[row, block]: the largest lower bound of any logit in SPAN columns; grid (blocks, rows)
template <typename T>
__device__ void tops_of(const T* products, const Law* laws, const double* norms, const double* log_weights, Index count,
                        double last, double least, double* tops, double* shared)
{
    Law law = laws[blockIdx.y];
    const T* row = products + (Index)blockIdx.y * count;
    double mine = -1.0 / 0.0;
    Index start = (Index)blockIdx.x * SPAN, stop = start + SPAN < count ? start + SPAN : count;
    for (Index k = start + threadIdx.x; k < stop; k += THREADS) {
        double lower = logit(law, row[k], norms[k], log_weights[k]) - error(law, norms[k], last, least);
        mine = larger(mine, lower);
    }
    double found = largest(mine, shared);
    if (threadIdx.x == 0) tops[(Index)blockIdx.y * gridDim.x + blockIdx.x] = found;
}

// weights exp(logit - top) in place of the products, and their sums, sums of squares, and sums times |v|^2 by block
template <typename T>
__device__ void weights_of(T* products, const Law* laws, const double* norms, const double* log_weights,
                           const double* tops, const double* cuts, Index count, double* sums, double* shared)
{
    Law law = laws[blockIdx.y];
    T* row = products + (Index)blockIdx.y * count;
    double top = tops[blockIdx.y], cut = cuts[blockIdx.y], found[SQUARES] = {0.0, 0.0, 0.0};
    Index start = (Index)blockIdx.x * SPAN, stop = start + SPAN < count ? start + SPAN : count;
    for (Index k = start + threadIdx.x; k < stop; k += THREADS) {
        double below = logit(law, row[k], norms[k], log_weights[k]) - top;
        double weight = below >= -cut ? exp(below) : 0.0;
        row[k] = (T)weight;
        found[0] += weight;
        found[1] += weight * weight;
        found[2] += weight * norms[k] * norms[k];
    }
    for (int i = 0; i < SQUARES; i++) {
        double all = total(found[i], shared);
        if (threadIdx.x == 0) sums[((Index)blockIdx.y * gridDim.x + blockIdx.x) * SQUARES + i] = all;
    }
}

// high + low = |x - alpha y|^2 of listed components, those of -1 left alone; grid (columns of the list, rows)
template <typename T>
__device__ void squares_of(const double* queries, const double* alphas, const T* points, const Index* listed, Index dim,
                           double* high, double* low, double* shared)
{
    Index place = (Index)blockIdx.y * gridDim.x + blockIdx.x, k = listed[place];
    if (k < 0) return;
    const double* x = queries + (Index)blockIdx.y * dim;
    const T* y = points + k * dim;
    TwoTerms mine = {0.0, 0.0};
    for (Index j = threadIdx.x; j < dim; j += THREADS)
        mine = plus(mine, squared_residual(x[j], alphas[blockIdx.y], y[j]));
    double *highs = shared, *lows = shared + THREADS;
    highs[threadIdx.x] = mine.high;
    lows[threadIdx.x] = mine.low;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        int other = threadIdx.x + half;
        if (threadIdx.x < half) {
            TwoTerms both = plus({highs[threadIdx.x], lows[threadIdx.x]}, {highs[other], lows[other]});
            highs[threadIdx.x] = both.high;
            lows[threadIdx.x] = both.low;
        }
    }
    if (threadIdx.x == 0) {
        high[place] = highs[0];
        low[place] = lows[0];
    }
}

// sums over listed components of w (y - a) and w (y - a)^2, a thread for each coordinate; grid (blocks, rows)
template <typename T>
__device__ void offsets_of(const T* points, const Index* listed, const Index* anchors, const double* weights, Index dim,
                           Index width, double* first, double* second)
{
    Index j = (Index)blockIdx.x * THREADS + threadIdx.x, row = blockIdx.y;
    if (j >= dim) return;
    double anchor = points[anchors[row] * dim + j], sum = 0.0, squares = 0.0;
    for (Index l = 0; l < width; l++) {
        double weight = weights[row * width + l];
        if (weight == 0.0) continue;
        double offset = (double)points[listed[row * width + l] * dim + j] - anchor;
        sum += weight * offset;
        squares += weight * offset * offset;
    }
    first[row * dim + j] = sum;
    second[row * dim + j] = squares;
}

// (y - a) . probe of listed components for every probe; grid (columns of the list, rows)
template <typename T>
__device__ void along_of(const T* points, const Index* listed, const Index* anchors, const double* probes, Index dim,
                         Index columns, double* along, double* shared)
{
    Index place = (Index)blockIdx.y * gridDim.x + blockIdx.x, k = listed[place];
    if (k < 0) return;
    const T *y = points + k * dim, *a = points + anchors[blockIdx.y] * dim;
    for (Index i = 0; i < columns; i++) {
        double mine = 0.0;
        for (Index j = threadIdx.x; j < dim; j += THREADS)
            mine += ((double)y[j] - (double)a[j]) * probes[((Index)blockIdx.y * dim + j) * columns + i];
        double all = total(mine, shared);
        if (threadIdx.x == 0) along[place * columns + i] = all;
    }
}

// sums over listed components of factor (y - a), for each of the factors' columns; grid (blocks, rows, columns)
template <typename T>
__device__ void products_of(const T* points, const Index* listed, const Index* anchors, const double* factors, Index dim,
                            Index width, double* found)
{
    Index j = (Index)blockIdx.x * THREADS + threadIdx.x, row = blockIdx.y, columns = gridDim.z;
    if (j >= dim) return;
    double anchor = points[anchors[row] * dim + j], sum = 0.0;
    for (Index l = 0; l < width; l++) {
        double factor = factors[(row * width + l) * columns + blockIdx.z];
        if (factor != 0.0) sum += factor * ((double)points[listed[row * width + l] * dim + j] - anchor);
    }
    found[(row * dim + j) * columns + blockIdx.z] = sum;
}

#define FOR(T)                                                                                                         \
    extern "C" __global__ void largest_lower_bounds_##T(const T* products, const Law* laws, const double* norms,       \
                                                        const double* log_weights, Index count, double last,          \
                                                        double least, double* tops)                                    \
    {                                                                                                                  \
        __shared__ double shared[THREADS];                                                                             \
        tops_of(products, laws, norms, log_weights, count, last, least, tops, shared);                                 \
    }                                                                                                                  \
    extern "C" __global__ void weights_and_sums_##T(T* products, const Law* laws, const double* norms,                 \
                                                    const double* log_weights, const double* tops,                     \
                                                    const double* cuts, Index count, double* sums)                     \
    {                                                                                                                  \
        __shared__ double shared[THREADS];                                                                             \
        weights_of(products, laws, norms, log_weights, tops, cuts, count, sums, shared);                               \
    }                                                                                                                  \
    extern "C" __global__ void squared_distances_##T(const double* queries, const double* alphas, const T* points,     \
                                                     const Index* listed, Index dim, double* high, double* low)        \
    {                                                                                                                  \
        __shared__ double shared[2 * THREADS];                                                                         \
        squares_of(queries, alphas, points, listed, dim, high, low, shared);                                           \
    }                                                                                                                  \
    extern "C" __global__ void sums_of_offsets_##T(const T* points, const Index* listed, const Index* anchors,         \
                                                   const double* weights, Index dim, Index width, double* first,       \
                                                   double* second)                                                     \
    {                                                                                                                  \
        offsets_of(points, listed, anchors, weights, dim, width, first, second);                                       \
    }                                                                                                                  \
    extern "C" __global__ void along_probes_##T(const T* points, const Index* listed, const Index* anchors,            \
                                                const double* probes, Index dim, Index columns, double* along)         \
    {                                                                                                                  \
        __shared__ double shared[THREADS];                                                                             \
        along_of(points, listed, anchors, probes, dim, columns, along, shared);                                        \
    }                                                                                                                  \
    extern "C" __global__ void sums_of_products_##T(const T* points, const Index* listed, const Index* anchors,        \
                                                    const double* factors, Index dim, Index width, double* found)      \
    {                                                                                                                  \
        products_of(points, listed, anchors, factors, dim, width, found);                                              \
    }

FOR(float)
FOR(double)

// How many columns of a block can matter: those whose upper bound is not below the row's threshold; grid (blocks, rows)
extern "C" __global__ void count_candidates(const float* products, const Law* laws, const double* norms,
                                            const double* log_weights, const double* thresholds, Index count,
                                            double last, double least, Index* counts)
{
    __shared__ Index shared[THREADS];
    Law law = laws[blockIdx.y];
    const float* row = products + (Index)blockIdx.y * count;
    Index mine = 0, all, start = (Index)blockIdx.x * SPAN, stop = start + SPAN < count ? start + SPAN : count;
    for (Index k = start + threadIdx.x; k < stop; k += THREADS) {
        double upper = logit(law, row[k], norms[k], log_weights[k]) + error(law, norms[k], last, least);
        mine += upper >= thresholds[blockIdx.y];
    }
    before(mine, shared, &all);
    if (threadIdx.x == 0) counts[(Index)blockIdx.y * gridDim.x + blockIdx.x] = all;
}

// Their places, in order, from where the blocks before have ended; what has no room in the list is not written
extern "C" __global__ void list_candidates(const float* products, const Law* laws, const double* norms,
                                           const double* log_weights, const double* thresholds, Index count,
                                           double last, double least, const Index* counts, const Index* places,
                                           Index first, Index most, Index* listed)
{
    __shared__ Index shared[THREADS];
    Index block = (Index)blockIdx.y * gridDim.x + blockIdx.x;
    if (counts[block] == 0) return;
    Law law = laws[blockIdx.y];
    const float* row = products + (Index)blockIdx.y * count;
    Index mine = 0, all, start = (Index)blockIdx.x * SPAN + threadIdx.x * EACH;
    Index stop = start + EACH < count ? start + EACH : count;
    unsigned chosen = 0;  // a bit for each of EACH columns
    for (Index k = start; k < stop; k++) {
        double upper = logit(law, row[k], norms[k], log_weights[k]) + error(law, norms[k], last, least);
        if (upper >= thresholds[blockIdx.y]) chosen |= 1u << (k - start), mine++;
    }
    Index place = places[block] + before(mine, shared, &all);
    for (int i = 0; i < EACH; i++)
        if (chosen >> i & 1u && place < most) listed[(Index)blockIdx.y * most + place++] = first + start + i;
}
