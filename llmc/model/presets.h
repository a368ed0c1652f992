// Named model sizes, as users of llm.c know them: gpt2:d12 (depth names the size; plain d12 works too), gpt3:c768
// (channels name it), those of the HelixPipe paper (arXiv 2507.00394), and two byte-level models small enough for a
// CPU. Explicit --layers and so on override them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

struct Preset {
    const char* name;
    int64_t layers, channels, heads, context;
    const char* tokenizer;  // what the sizes were made for, used unless --tokenizer says otherwise
};

// "custom" leaves every size to the flags, or to the model that --init-from names.
inline const std::vector<Preset>& presets() {
    static const std::vector<Preset> table = {
        {"tiny", 4, 192, 4, 256, "bytes"},
        {"bytes", 6, 384, 6, 512, "bytes"},
        {"gpt2:d12", 12, 768, 12, 1024, "gpt2"},
        {"gpt2:d24", 24, 1024, 16, 1024, "gpt2"},
        {"gpt2:d36", 36, 1280, 20, 1024, "gpt2"},
        {"gpt2:d48", 48, 1600, 25, 1024, "gpt2"},
        {"gpt3:c384", 6, 384, 6, 2048, "gpt2"},
        {"gpt3:c768", 12, 768, 12, 2048, "gpt2"},
        {"gpt3:c1024", 24, 1024, 16, 2048, "gpt2"},
        {"gpt3:c1536", 24, 1536, 16, 2048, "gpt2"},
        {"gpt3:c2048", 24, 2048, 16, 2048, "gpt2"},
        {"gpt3:c2560", 32, 2560, 32, 2048, "gpt2"},
        {"gpt3:c4096", 32, 4096, 32, 2048, "gpt2"},
        {"gpt3:c5120", 40, 5120, 40, 2048, "gpt2"},
        {"gpt3:c12288", 96, 12288, 96, 2048, "gpt2"},
        {"helixpipe:1.3b", 24, 2048, 16, 131072, "gpt2"},
        {"helixpipe:3b", 16, 4096, 32, 131072, "gpt2"},
        {"helixpipe:7b", 32, 4096, 32, 131072, "gpt2"},
        {"custom", 0, 0, 0, 0, "bytes"},
    };
    return table;
}

inline const Preset* find_preset(const std::string& name) {
    for (const Preset& preset : presets())
        if (name == preset.name || "gpt2:" + name == preset.name) return &preset;
    return nullptr;
}
