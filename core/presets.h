// presets.h: shapes of GPTs by name.
#pragma once
#include <string.h>  // strcmp

enum Position { POSITION_ROPE, POSITION_LEARNED };

struct Preset { const char* name; int layers, heads, width; Position position; };

static const Preset presets[] = {
    // GPT-2 by depth, as in llm.c
    {"gpt2:d6", 6, 6, 384, POSITION_LEARNED}, {"gpt2:d12", 12, 12, 768, POSITION_LEARNED}, {"gpt2:d24", 24, 16, 1024, POSITION_LEARNED},
    {"gpt2:d36", 36, 20, 1280, POSITION_LEARNED}, {"gpt2:d48", 48, 25, 1600, POSITION_LEARNED}, {"gpt2:d60", 60, 30, 1920, POSITION_LEARNED},
    {"gpt2:d72", 72, 30, 2880, POSITION_LEARNED}, {"gpt2:d84", 84, 36, 3456, POSITION_LEARNED},
    // GPT-3 by width (Brown et al. 2020, table 2.1)
    {"gpt3:c384", 6, 6, 384, POSITION_LEARNED}, {"gpt3:c768", 12, 12, 768, POSITION_LEARNED}, {"gpt3:c1024", 24, 16, 1024, POSITION_LEARNED},
    {"gpt3:c1536", 24, 16, 1536, POSITION_LEARNED}, {"gpt3:c2048", 24, 16, 2048, POSITION_LEARNED}, {"gpt3:c2560", 32, 32, 2560, POSITION_LEARNED},
    {"gpt3:c4096", 32, 32, 4096, POSITION_LEARNED}, {"gpt3:c5120", 40, 40, 5120, POSITION_LEARNED}, {"gpt3:c12288", 96, 96, 12288, POSITION_LEARNED},
    // FP8-LM's table 1
    {"gpt3:125m", 12, 12, 768, POSITION_ROPE}, {"gpt3:7b", 32, 32, 4096, POSITION_ROPE}, {"gpt3:13b", 40, 40, 5120, POSITION_ROPE},
    {"gpt3:175b", 96, 96, 12288, POSITION_ROPE},
};

// NULL: no such name
static inline const Preset* find_preset(const char* name) {
    for (const Preset& p : presets) {
        if (strcmp(p.name, name) == 0 || (strncmp(p.name, "gpt2:", 5) == 0 && strcmp(p.name + 5, name) == 0)) { return &p; }
    }
    return NULL;
}
