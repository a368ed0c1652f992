// safetensors files: 8 bytes of header length (little-endian), a JSON header, the tensors' bytes back to back.
// The reader proves every size against the file before it allocates or reads a tensor; the writer streams.
// Format: https://github.com/huggingface/safetensors. Callers: checkpoint.h, huggingface.h.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "llmc/io/files.h"
#include "llmc/io/json.h"

static_assert(std::endian::native == std::endian::little, "safetensors data is little-endian");

struct TensorInfo {
    std::string name, dtype;
    std::vector<int64_t> shape;
    int64_t begin = 0, end = 0;  // bytes, from the end of the header

    int64_t elements() const {
        int64_t product = 1;
        for (int64_t n : shape) product *= n;
        return product;
    }
};

// Bytes an element, 0 for a type that the format does not have.
inline int64_t dtype_bytes(const std::string& dtype) {
    static const std::unordered_map<std::string, int64_t> table = {
        {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E5M2", 1}, {"F8_E4M3", 1}, {"I16", 2}, {"U16", 2}, {"F16", 2},
        {"BF16", 2}, {"I32", 4}, {"U32", 4}, {"F32", 4},     {"I64", 8},     {"U64", 8}, {"F64", 8}};
    const auto found = table.find(dtype);
    return found == table.end() ? 0 : found->second;
}

template <class T>
constexpr const char* dtype_of() {
    if constexpr (std::is_same_v<T, double>) return "F64";
    else if constexpr (std::is_same_v<T, float>) return "F32";
    else return "BF16";
}

inline std::string shape_text(const std::vector<int64_t>& shape) {
    std::string text = "[";
    for (size_t i = 0; i < shape.size(); i++) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
}

inline float half_to_float(uint16_t half) {
    const uint32_t exponent = (half >> 10) & 31u, mantissa = half & 1023u;
    uint32_t bits = uint32_t(half & 0x8000u) << 16;
    if (exponent == 0) return std::copysign(std::ldexp(float(mantissa), -24), std::bit_cast<float>(bits));
    bits |= (exponent == 31 ? 255u : exponent + 112u) << 23 | mantissa << 13;
    return std::bit_cast<float>(bits);
}

// ---------------------------------------------------------------------------------------------------------------------
class SafetensorsReader {
public:
    explicit SafetensorsReader(const std::string& path) : file(path) {
        if (file.size() < 8) refuse("has " + std::to_string(file.size()) + " bytes, too few for a header length");
        uint64_t header_bytes = 0;
        file.read(0, &header_bytes, 8);
        if (header_bytes > uint64_t(json_bytes_limit) || header_bytes > uint64_t(file.size() - 8))
            refuse("claims a header of " + std::to_string(header_bytes) + " bytes in a file of " +
                   std::to_string(file.size()) + "; headers have at most " + std::to_string(json_bytes_limit));
        std::string header(header_bytes, '\0');
        file.read(8, header.data(), header.size());
        if (!header.starts_with('{')) refuse("has a header that does not begin with '{'");
        data_begin = 8 + int64_t(header_bytes);

        const std::string where = path + "'s header";
        const nlohmann::json contents = parse_json(header, where);
        for (const auto& [name, entry] : contents.items())
            if (name != "__metadata__") list.push_back(tensor_info(name, entry, where + ", tensor \"" + name + "\","));
        std::sort(list.begin(), list.end(), [](const TensorInfo& a, const TensorInfo& b) {
            return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
        });
        int64_t at = 0;
        for (const TensorInfo& tensor : list) {
            if (tensor.begin != at)
                refuse("has tensor \"" + tensor.name + "\" at byte " + std::to_string(tensor.begin) + " of the data; " +
                       std::to_string(at) + " is where the one before ends");
            at = tensor.end;
        }
        if (at != file.size() - data_begin)
            refuse("has " + std::to_string(file.size() - data_begin) + " bytes of data where its header describes " +
                   std::to_string(at));
        for (size_t i = 0; i < list.size(); i++) index.emplace(list[i].name, i);
    }

    const std::string& path() const { return file.name(); }
    const std::vector<TensorInfo>& tensors() const { return list; }  // in the order of their bytes
    const TensorInfo* find(const std::string& name) const {
        const auto found = index.find(name);
        return found == index.end() ? nullptr : &list[found->second];
    }

    // Elements [first, first + count) of a tensor, converted to float or double.
    template <class T>
    void read_range(const TensorInfo& tensor, int64_t first, int64_t count, T* out) const {
        if (first < 0 || count < 0 || first > tensor.elements() - count)
            throw std::logic_error("elements " + std::to_string(first) + " + " + std::to_string(count) +
                                   " are not in " + tensor.name + " " + shape_text(tensor.shape));
        const int64_t at = data_begin + tensor.begin + first * dtype_bytes(tensor.dtype);
        if (tensor.dtype == dtype_of<T>()) file.read(at, out, size_t(count) * sizeof(T));
        else if (tensor.dtype == "F32") convert<float>(at, count, out, [](float x) { return x; });
        else if (tensor.dtype == "F64") convert<double>(at, count, out, [](double x) { return x; });
        else if (tensor.dtype == "F16") convert<uint16_t>(at, count, out, half_to_float);
        else if (tensor.dtype == "BF16")
            convert<uint16_t>(at, count, out, [](uint16_t x) { return std::bit_cast<float>(uint32_t(x) << 16); });
        else
            refuse("has tensor \"" + tensor.name + "\" as " + tensor.dtype +
                   "; F64, F32, F16 and BF16 can be read as numbers");
    }

private:
    [[noreturn]] void refuse(const std::string& what) const {
        throw Failure(EXIT_DATA, file.name() + " is not a sound safetensors file: it " + what + ".");
    }

    TensorInfo tensor_info(const std::string& name, const nlohmann::json& entry, const std::string& where) const {
        TensorInfo tensor{name, json_string(entry, "dtype", where), {}, 0, 0};
        int64_t bytes = dtype_bytes(tensor.dtype);
        if (bytes == 0) refuse("has tensor \"" + name + "\" of the unknown type \"" + tensor.dtype + "\"");
        const nlohmann::json &shape = json_member(entry, "shape", where),
                             &offsets = json_member(entry, "data_offsets", where);
        if (!shape.is_array() || !offsets.is_array() || offsets.size() != 2)
            refuse("has tensor \"" + name + "\" whose shape is no list or whose data_offsets are not two numbers");
        for (const nlohmann::json& dimension : shape) {
            tensor.shape.push_back(as_integer(dimension, where));
            if (__builtin_mul_overflow(bytes, tensor.shape.back(), &bytes))
                refuse("has tensor \"" + name + "\" of a shape beyond 2^63 bytes");
        }
        tensor.begin = as_integer(offsets[0], where);
        tensor.end = as_integer(offsets[1], where);
        if (tensor.begin > tensor.end || tensor.end > file.size() - data_begin || tensor.end - tensor.begin != bytes)
            refuse("gives tensor \"" + name + "\" the bytes " + std::to_string(tensor.begin) + " to " +
                   std::to_string(tensor.end) + " of " + std::to_string(file.size() - data_begin) + "; its shape " +
                   shape_text(tensor.shape) + " in " + tensor.dtype + " needs " + std::to_string(bytes));
        return tensor;
    }

    template <class Stored, class T, class Convert>
    void convert(int64_t at, int64_t count, T* out, Convert to_number) const {
        std::vector<Stored> block(size_t(std::min<int64_t>(count, 1 << 16)));
        for (int64_t done = 0; done < count;) {
            const int64_t n = std::min(int64_t(block.size()), count - done);
            file.read(at + done * int64_t(sizeof(Stored)), block.data(), size_t(n) * sizeof(Stored));
            for (int64_t i = 0; i < n; i++) out[done + i] = T(to_number(block[size_t(i)]));
            done += n;
        }
    }

    FileReader file;
    int64_t data_begin = 0;
    std::vector<TensorInfo> list;
    std::unordered_map<std::string, size_t> index;
};

// ---------------------------------------------------------------------------------------------------------------------
// The header comes first, from the list of tensors; then their elements are appended in that order, in any portions.
class SafetensorsWriter {
public:
    SafetensorsWriter(const std::string& path, const std::vector<TensorInfo>& tensors) : file(path) {
        nlohmann::json header = {{"__metadata__", {{"format", "pt"}}}};  // older transformers insist on it
        for (const TensorInfo& tensor : tensors) {
            const int64_t begin = remaining;
            remaining += tensor.elements() * dtype_bytes(tensor.dtype);
            header[tensor.name] = {
                {"dtype", tensor.dtype}, {"shape", tensor.shape}, {"data_offsets", {begin, remaining}}};
        }
        std::string text = json_text(header, -1);
        text.resize(size_t(round_up(int64_t(text.size()), 8)), ' ');  // the data begins aligned
        const uint64_t length = text.size();
        file.append(&length, 8);
        file.append(text.data(), text.size());
    }

    template <class T>
    void append(const T* values, int64_t count) {
        remaining -= count * int64_t(sizeof(T));
        file.append(values, size_t(count) * sizeof(T));
    }

    FileRecord finish() {
        if (remaining != 0) throw std::logic_error("a safetensors file got other bytes than its header says");
        return file.finish();
    }

private:
    FileWriter file;
    int64_t remaining = 0;  // bytes that the header promises and that have not come yet
};
