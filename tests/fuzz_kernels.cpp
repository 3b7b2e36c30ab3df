// Random matrices in heap blocks of exactly their size, under AddressSanitizer: nothing beyond them is touched, and the
// three instruction sets give the same bits. Usage: fuzz_kernels SEED COUNT. tests/test_kernels.py compiles and runs it.

#include "tiles.cpp"

#include <cstdio>
#include <cstdlib>
#include <random>

std::mt19937 generator;

int between(int least, int most) { return least + static_cast<int>(generator() % static_cast<unsigned>(most - least + 1)); }

std::vector<uint8_t> bytes(int64_t count) {
    std::vector<uint8_t> made(count);
    for (auto &b : made) b = static_cast<uint8_t>(generator());
    return made;
}

bool one() {
    const int heights[] = {1, 3, 5, 8, 16, 24, 32, 48}, rows = heights[between(0, 7)], columns = 32 * between(1, 5);
    const int out = between(1, 90), in = between(1, 500), batch = between(1, 8);
    const int strips = (out + rows - 1) / rows, tiles = (in + columns - 1) / columns;
    std::vector<uint16_t> counts(strips * 8), groups;
    std::vector<int64_t> code_starts, tile_starts;
    int64_t size = 0;
    for (int s = 0; s < strips; s++) {
        code_starts.push_back(size), tile_starts.push_back(static_cast<int64_t>(groups.size()));
        for (int t = 0; t < tiles; t++) {
            const int i = between(0, 7);
            counts[s * 8 + i]++;
            if (i) groups.push_back(static_cast<uint16_t>(between(0, tiles - 1)));
            size += static_cast<int64_t>(rows) * columns * WIDTHS[i] / 8;
        }
    }
    groups.shrink_to_fit();
    const auto live = static_cast<int64_t>(groups.size());
    const std::vector<uint8_t> codes = bytes(size), nibbles = bytes(live * ((rows + 1) / 2)), tile = bytes(live);
    std::vector<int32_t> order(in);
    for (int i = 0; i < in; i++) order[i] = i;
    const Matrix matrix{codes.data(), nibbles.data(), tile.data(), groups.data(), counts.data(), code_starts.data(),
                        tile_starts.data(), order.data(), out, in, rows, columns, between(-300, 0)};
    std::vector<float> x(static_cast<size_t>(batch) * in), y(static_cast<size_t>(batch) * out), first;
    for (auto &value : x) value = static_cast<float>(between(-1000, 1000));
    for (int digits : {1, 3})
        for (int set : {0, 1, 2}) {
            nashswarm_multiply(&matrix, x.data(), batch, digits, between(1, 3), set, y.data());
            if (set && std::memcmp(y.data(), first.data(), sizeof(float) * y.size())) return false;
            first = y;
        }
    const std::vector<float> steps(255 + 15, 1.0f);
    const std::vector<int64_t> numbers{0, between(0, out - 1), out - 1};
    std::vector<float> decoded(numbers.size() * static_cast<size_t>(in));
    nashswarm_rows(&matrix, numbers.data(), static_cast<int64_t>(numbers.size()), steps.data(), decoded.data());
    return true;
}

int main(int, char **words) {
    generator.seed(static_cast<unsigned>(std::atoi(words[1])));
    for (int i = 0; i < std::atoi(words[2]); i++)
        if (!one()) return std::printf("matrix %d: instruction sets differ\n", i), 1;
    return 0;
}
