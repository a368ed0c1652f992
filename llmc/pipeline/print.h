// A rank's list as a line of text, in the notation of the HelixPipe authors' traces:
//
//   Pk.mi   block k on chunk i: post(k-1) and pre(k), the embedding in block 0, the head in block L
//   Ak.mi   attention of layer k           P~k.mi, A~k.mi   backward           Pw.. weight gradients
//   <>q     the exchange posted after these with rank q, be it both ways or one
//   (recvq) a receive posted by itself
#pragma once

#include "llmc/pipeline/schedules/slots.h"

inline std::string print_list(const std::vector<Op>& list, const ScheduleInput& in) {
    const auto name = [&](const Op& op) {
        int k = op.layer;
        if (op.part == Part::embed) k = 0;
        if (op.part == Part::post) k = op.layer + 1;
        if (op.part == Part::head) k = in.layers;
        const char* const pass = op.pass == Pass::F ? "" : op.pass == Pass::B ? "~" : "w";
        return (op.part == Part::attention ? "A" : "P") + std::string(pass) + std::to_string(k) + ".m" +
               std::to_string(op.chunk);
    };
    std::string line, last;
    for (size_t i = 0; i < list.size();) {
        if (list[i].kind == Kind::compute) {
            if (const std::string now = name(list[i]); now != last) line += (line.empty() ? "" : " ") + (last = now);
            ++i;
            continue;
        }
        const bool alone = last.empty();  // no op since the batch before
        std::vector<int> peers;
        for (const int batch = list[i].batch; i < list.size() && list[i].batch == batch; ++i)
            if (std::find(peers.begin(), peers.end(), list[i].peer) == peers.end()) peers.push_back(list[i].peer);
        for (int peer : peers)
            if (alone) line += (line.empty() ? "(recv" : " (recv") + std::to_string(peer) + ")";
            else line += "<>" + std::to_string(peer);
        last.clear();
    }
    return line;
}
