// Damaged token files against the reader and the loader: each of 4,000 mutations must be read correctly or refused with
// exit code 3 and the file's name, and opening must not allocate by what a header claims. Built with ASan and UBSan.
#include <cstdio>
#include <cstdlib>
#include <random>

#include "llmc/data/packing.h"

// of ASan's runtime; g++ 12 has no header for it
extern "C" int __sanitizer_install_malloc_and_free_hooks(void (*)(const volatile void*, size_t),
                                                         void (*)(const volatile void*));

static size_t largest_allocation = 0;  // bytes, since it was last set to 0
static void note_allocation(const volatile void*, size_t bytes) {
    largest_allocation = std::max(largest_allocation, bytes);
}
static void note_release(const volatile void*) {}

static std::mt19937_64 random_bits(1);
static int64_t random_below(int64_t n) { return int64_t(random_bits() % uint64_t(n)); }

static void check(bool condition, const char* what) {
    if (condition) return;
    std::printf("fuzz_token_file: failed: %s\n", what);
    std::exit(1);
}

static std::string valid_file(const TokenFormat& format, int64_t tokens) {
    std::string bytes(size_t(token_header_bytes + tokens * format.token_bytes), '\0');
    const int32_t header[3] = {format.magic, format.version, int32_t(tokens)};
    std::memcpy(bytes.data(), header, sizeof header);
    for (int64_t i = 0; i < tokens; i++) {
        const uint32_t id = uint32_t(random_below(8) ? random_below(256) : 256);
        std::memcpy(bytes.data() + token_header_bytes + i * format.token_bytes, &id, size_t(format.token_bytes));
    }
    return bytes;
}

static void mutate(std::string& bytes) {
    const int64_t size = int64_t(bytes.size());
    const auto set_int = [&](int64_t field, int64_t value) {
        const int32_t v = int32_t(value);
        if (4 * field + 4 <= size) std::memcpy(bytes.data() + 4 * field, &v, 4);
    };
    switch (random_below(9)) {
        case 0:
            bytes.resize(size_t(random_below(size + 1)));
            break;  // cut anywhere
        case 1:
            bytes.resize(size_t(random_below(std::min<int64_t>(size, 1100) + 1)));
            break;  // cut near the header
        case 2:
            bytes.append(size_t(1 + random_below(64)), char(random_bits()));
            break;
        case 3:
            set_int(2, int64_t(random_bits()));
            break;  // any count
        case 4:
            set_int(2, random_below(2) ? 0x7fffffff : -1);
            break;  // the largest ones
        case 5:
            set_int(random_below(3), int64_t(random_bits()));
            break;  // any field
        case 6:
            set_int(0, token_formats[random_below(2)].magic);
            break;  // perhaps the other format's
        case 7:
            set_int(1, random_below(2) ? 1 : 7);
            break;
        default:
            for (int64_t flips = 1 + random_below(8); flips > 0 && size > 0; flips--)
                bytes[size_t(random_below(size))] ^= char(1 << random_below(8));
    }
}

// Reads the file in every way that the program has; its contents are known.
static void read_everything(const std::string& path, const std::string& bytes) {
    largest_allocation = 0;
    const TokenFile file(path);
    check(largest_allocation <= 4096, "opening a file allocates by its contents");

    check(token_header_bytes + file.size() * file.token_bytes() == int64_t(bytes.size()), "size");
    std::vector<int32_t> expected(size_t(file.size())), ids(expected.size());
    for (size_t i = 0; i < expected.size(); i++)
        std::memcpy(&expected[i], bytes.data() + token_header_bytes + int64_t(i) * file.token_bytes(),
                    size_t(file.token_bytes()));
    file.read(0, file.size(), ids.data());
    check(ids == expected, "ids");
    for (const Packing packing : {Packing::contiguous, Packing::documents}) {
        LoaderOptions options;
        options.packing = packing;
        options.context = 16;
        largest_allocation = 0;
        const Loader loader(open_token_files(path), options);
        check(largest_allocation <= 8 * bytes.size() + 4096, "the index allocates more than the file's size warrants");
        const Batch batch = next_batch(loader, 0, file.size(), loader.samples());
        for (const Chunk& chunk : make_chunks(batch, 7))
            for (int32_t id : gather_chunk(batch, chunk).tokens)
                check(id >= 0 && id < options.vocab, "id outside the vocabulary");
    }
}

int main() {
    check(__sanitizer_install_malloc_and_free_hooks(note_allocation, note_release), "ASan takes no hooks");
    const std::string directory =
        std::filesystem::temp_directory_path() / ("fuzz_token_file." + std::to_string(getpid()));
    create_directories(directory);
    const std::string path = directory + "/tokens.bin";
    int read = 0, refused = 0;
    const auto attempt = [&](const std::string& bytes) {
        write_file(path, bytes);
        try {
            read_everything(path, bytes);
            read++;
        } catch (const Failure& failure) {
            const std::string message = failure.what();
            check(failure.exit_code == EXIT_DATA, "exit code");
            check(message.find(path) != std::string::npos, "the message does not name the file");
            check(message.find(", byte ") != std::string::npos || message.starts_with("No sample") ||
                      message.starts_with("No end-of-text"),
                  "the message names no byte");
            refused++;
        }
    };
    for (int i = 0; i < 4000; i++) {
        std::string bytes = valid_file(token_formats[i % 2], random_below(i % 10 ? 200 : 3));
        if (i % 16) mutate(bytes);
        if (i % 4 == 1) mutate(bytes);
        attempt(bytes);
    }
    remove_tree(directory);
    check(read > 250 && refused > 2000, "the mutations are not a mixture of readable and damaged files");
    std::printf("%d files read correctly, %d refused\n4000 passed, 0 failed\n", read, refused);
}
