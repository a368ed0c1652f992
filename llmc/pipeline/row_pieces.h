// Row pieces: all of a block of HelixPipe works row by row, so a block can pass on the rows it has done while it works on
// the next ones, and begin with the first rows that arrive. A message then costs its way only the time of one piece, and
// one fold is enough to hide the rest, with half the chunks in memory and half the ramp of two.
//
//   rank 0  | P(k, 0) rows 1 | rows 2 | P(k, 1) rows 1 | rows 2 |        pieces of X(k, 0) leave after each,
//   rank 1                    ......... | A(k, 0)                        the attention waits for the last one
//
// Every message of a schedule is cut into so many pieces, and so is every pre and post, but for those of a spread head,
// whose neighbours are on the same rank. The exchange after a block becomes one after each of its pieces; the exchange
// after an attention, whose rows all end together, becomes as many in a row. Both ends of an exchange are cut alike, so
// that they still meet.
#pragma once

#include "llmc/pipeline/schedules/slots.h"

inline OpLists cut_into_row_pieces(const OpLists& lists, const ScheduleInput& in, int pieces) {
    const auto is_cut = [&](const Op& op) {
        if (op.kind != Kind::compute) return true;
        const bool block = op.pass != Pass::W && (op.part == Part::pre || op.part == Part::post);
        return block && !(in.spread_head && in_last_block(op.part, op.layer, in.layers));
    };
    OpLists cut(lists.size());
    for (size_t r = 0; r < lists.size(); ++r) {
        const std::vector<Op>& list = lists[r];
        int batch = -1;
        for (size_t i = 0; i < list.size();) {
            // What runs piece by piece: a block of one chunk and the exchange after it, or one of these by itself.
            size_t end = i;
            while (end < list.size() && list[end].kind == Kind::compute && is_cut(list[end]) &&
                   list[end].chunk == list[i].chunk)
                ++end;
            const size_t exchange = end;
            while (end < list.size() && list[end].kind != Kind::compute && list[end].batch == list[exchange].batch)
                ++end;
            if (end == i) cut[r].push_back(list[i++]);
            for (int piece = 0; piece < pieces && i < end; ++piece) {
                batch += end > exchange;
                for (size_t n = i; n < end; ++n) {
                    Op op = list[n];
                    op.piece = piece, op.pieces = pieces;
                    op.weights = op.weights && piece == (op.pass == Pass::F ? 0 : pieces - 1);
                    if (op.kind != Kind::compute) op.batch = batch;
                    cut[r].push_back(op);
                }
            }
            i = std::max(i, end);
        }
    }
    return cut;
}
