// A rank's list as a line of text, in the notation of the HelixPipe authors' traces:
//
//   Pk.mi          block k on chunk i: post(k-1) and pre(k), the embedding in block 0, the head in block L
//   Ak.mi          attention of layer k on chunk i
//   P~k.mi Pwk.mi  backward, weight gradients
//   Pk.mi/n        its n-th row piece
//   <>q            the exchange with rank q posted after these, be it both ways or one
//   (recvq recvq)  receives posted by themselves
#pragma once

#include "llmc/pipeline/schedules/slots.h"

inline std::string print_list(const std::vector<Op>& list, const ScheduleInput& in) {
    const auto name = [&](const Op& op) {
        static const char* const passes[] = {"", "~", "w"};
        const bool attention = op.part == Part::attention;
        const int number = attention ? op.layer : Chain{in.layers, in.training}.block(op.part, op.layer);
        return (attention ? "A" : "P") + std::string(passes[int(op.pass)]) + std::to_string(number) + ".m" +
               std::to_string(op.chunk) + (op.pieces > 1 ? "/" + std::to_string(op.piece + 1) : "");
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
        for (int peer : peers) {
            const std::string name = std::to_string(peer);
            if (!alone) line += "<>" + name;
            else if (!line.ends_with(")")) line += (line.empty() ? "(recv" : " (recv") + name + ")";
            else line.insert(line.size() - 1, " recv" + name);
        }
        last.clear();
    }
    return line;
}
