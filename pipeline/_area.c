/* Shrinking 8-bit BGR images by area averaging: the numbers of OpenCV's INTER_AREA, four times as fast.
 *
 * A result pixel is the mean of the source rectangle that it covers, pixels at the rectangle's edges weighted by the
 * part that lies inside. Same result as OpenCV means same arithmetic: single precision, a row's pixels summed first,
 * then the rows, each in ascending order, rounded half to even. Four source rows are done side by side, and every
 * result pixel has the same number of weights (the last ones zero), so that the inner loop has no branch to mispredict.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__)
#define FOR_EACH_CPU __attribute__((target_clones("avx2", "default")))
#else
#define FOR_EACH_CPU
#endif

#define LANES 4 /* blue, green, red, and one that is not used */
#define ROWS 4

typedef float Pixel __attribute__((vector_size(LANES * sizeof(float))));

/* What one axis does: result pixel i is the sum of weights[i * taps + k] * source[first[i] + k]. */
typedef struct {
    int taps;
    int *first;
    float *weights;
} Axis;

static int plan(Axis *axis, int source, int target)
{
    double scale = 1.0 / ((double)target / source);
    int most = (int)ceil(scale) + 2;
    axis->taps = 0;
    axis->first = malloc(target * sizeof(int));
    axis->weights = calloc((size_t)target * most, sizeof(float));
    float *weights = calloc(most, sizeof(float));
    int is_ready = axis->first && axis->weights && weights;
    for (int pass = 0; is_ready && pass < 2; pass++) { /* the first finds the number of taps */
        for (int i = 0; i < target; i++) {
            double from = i * scale, to = from + scale, covered = fmin(scale, source - from);
            int end = (int)floor(to), begin = (int)ceil(from), count = 0;
            end = end < source - 1 ? end : source - 1;
            begin = begin < end ? begin : end;
            axis->first[i] = begin;
            if (begin - from > 1e-3) { /* slivers below a thousandth of a pixel do not count */
                axis->first[i] = begin - 1;
                weights[count++] = (float)((begin - from) / covered);
            }
            for (int at = begin; at < end; at++)
                weights[count++] = (float)(1.0 / covered);
            if (to - end > 1e-3)
                weights[count++] = (float)(fmin(fmin(to - end, 1.0), covered) / covered);
            if (pass)
                memcpy(axis->weights + (size_t)i * axis->taps, weights, count * sizeof(float));
            else if (count > axis->taps)
                axis->taps = count;
        }
    }
    free(weights);
    return is_ready;
}

FOR_EACH_CPU
static void widen(const uint8_t *row, int n, float *wide)
{
    for (int i = 0; i < n; i++)
        wide[i] = row[i];
}

/* ROWS rows that lie `stride` floats apart, in the result `packed` apart and each `target` pixels long. */
FOR_EACH_CPU
static void shrink_rows(const float *wide, size_t stride, const Axis *axis, int target, float *result, size_t packed)
{
    const float *weights = axis->weights;
    for (int x = 0; x < target; x++, weights += axis->taps) {
        const float *at = wide + 3 * (size_t)axis->first[x];
        Pixel sums[ROWS] = {{0}};
        for (int k = 0; k < axis->taps; k++, at += 3) {
            for (int row = 0; row < ROWS; row++) {
                Pixel pixel;
                memcpy(&pixel, at + row * stride, sizeof pixel);
                sums[row] += pixel * weights[k];
            }
        }
        for (int row = 0; row < ROWS; row++)
            memcpy(result + row * packed + 3 * (size_t)x, &sums[row], sizeof(Pixel)); /* the next one covers the lane */
    }
}

FOR_EACH_CPU
static void add_row(const float *row, float weight, int is_first, int n, float *sum)
{
    for (int i = 0; i < n; i++)
        sum[i] = is_first ? weight * row[i] : sum[i] + weight * row[i];
}

FOR_EACH_CPU
static void round_row(const float *sum, int n, uint8_t *result)
{
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it leaves the whole number in the lowest bits */
    for (int i = 0; i < n; i++) {
        float shifted = sum[i] + shift;
        uint32_t bits;
        memcpy(&bits, &shifted, sizeof bits);
        result[i] = (uint8_t)bits;
    }
}

/* source [height][width][3] -> result [target_height][target_width][3], no side of it longer. 0, or -1 without memory. */
int pairmill_shrink_area(const uint8_t *source, int height, int width, uint8_t *result, int target_height,
                         int target_width)
{
    Axis across, down;
    int is_ready = plan(&across, width, target_width) & plan(&down, height, target_height);
    size_t stride = 3 * ((size_t)width + across.taps) + LANES; /* weights of zero reach beyond the row's end */
    float *wide = calloc(ROWS * stride, sizeof(float));
    size_t packed = 3 * (size_t)target_width + LANES;
    float *rows = calloc((ROWS + 1) * packed, sizeof(float));
    int num_done = 0;
    is_ready = is_ready && wide && rows;
    for (int y = 0; is_ready && y < target_height; y++) {
        float *sum = rows + ROWS * packed;
        for (int k = 0; k < down.taps; k++) {
            int at = down.first[y] + k;
            float weight = down.weights[(size_t)y * down.taps + k];
            if (weight == 0)
                continue;
            while (at >= num_done) {
                for (int row = 0; row < ROWS && num_done + row < height; row++)
                    widen(source + (size_t)(num_done + row) * width * 3, 3 * width, wide + row * stride);
                shrink_rows(wide, stride, &across, target_width, rows, packed);
                num_done += ROWS;
            }
            add_row(rows + at % ROWS * packed, weight, k == 0, 3 * target_width, sum);
        }
        round_row(sum, 3 * target_width, result + (size_t)y * target_width * 3);
    }
    free(across.first);
    free(across.weights);
    free(down.first);
    free(down.weights);
    free(wide);
    free(rows);
    return is_ready ? 0 : -1;
}
