// Row pieces: all of a block of HelixPipe works row by row, so a block can pass on the rows it has done while it works
// on the next ones, and begin with the first rows that arrive. Of a message's way only that of one piece then costs
// time, so that one fold is enough to hide messages, with half the chunks in memory and half the ramp of two.
//
//   rank 0  | P(k, 0) rows 1 | rows 2 | P(k, 1) rows 1 | rows 2 |        a piece of X(k, 0) leaves after each,
//   rank 1                ...............  | A(k, 0)                     the attention begins when the last is there
//
// Every message of a schedule is cut into so many pieces, and so is every pre and post, but for those of a spread head,
// whose neighbours are on the same rank. An exchange is of what a block has made for an attention and what an attention
// has made for a block. The pieces from the block go first, one after each of its pieces, and the other rank expects
// them while its attention still runs; the pieces from the attention follow, since they all become ready at its end and
// the block takes them one at a time. Both ends keep to this order, the last of the one and the first of the other
// together, so that they meet.
#pragma once

#include "llmc/pipeline/schedules/slots.h"

inline OpLists cut_into_row_pieces(const OpLists& lists, const ScheduleInput& in, int pieces) {
    const auto is_cut = [&](const Op& op) {
        const bool block = op.pass != Pass::W && (op.part == Part::pre || op.part == Part::post);
        return block && !(in.spread_head && in_last_block(op.part, op.layer, in.layers));
    };
    OpLists cut(lists.size());
    for (size_t r = 0; r < lists.size(); ++r) {
        const std::vector<Op>& list = lists[r];
        int batch = 0;
        const auto add = [&](Op op, int piece) {
            op.piece = piece, op.pieces = pieces;
            op.weights = op.weights && piece == (op.pass == Pass::F ? 0 : pieces - 1);
            if (op.kind != Kind::compute) op.batch = batch;
            cut[r].push_back(op);
        };
        for (size_t i = 0; i < list.size();) {
            size_t exchange = i;  // the ops of a slot, then its exchange
            while (exchange < list.size() && list[exchange].kind == Kind::compute) ++exchange;
            size_t end = exchange;
            while (end < list.size() && list[end].kind != Kind::compute && list[end].batch == list[exchange].batch)
                ++end;
            const auto post = [&](int piece, auto which) {  // those messages of the exchange, in one batch
                for (size_t n = exchange; n < end; ++n)
                    if (which(list[n])) add(list[n], piece);
            };
            const auto end_batch = [&] { batch += !cut[r].empty() && cut[r].back().batch == batch; };
            const auto from_attention = [](const Op& op) { return op.part == Part::attention; };
            const auto from_block = [&](Kind kind) {
                return [=](const Op& op) { return op.kind == kind && !from_attention(op); };
            };
            for (int piece = 0; piece < pieces - 1; ++piece) post(piece, from_block(Kind::receive)), end_batch();
            while (i < exchange) {
                size_t block = i;  // the ops of one chunk that run piece by piece
                while (block < exchange && is_cut(list[block]) && list[block].chunk == list[i].chunk) ++block;
                if (block == i) cut[r].push_back(list[i++]);
                for (int piece = 0; piece < pieces && i < block; ++piece) {
                    for (size_t n = i; n < block; ++n) add(list[n], piece);
                    if (block == exchange && piece < pieces - 1) post(piece, from_block(Kind::send)), end_batch();
                }
                i = std::max(i, block);
            }
            post(pieces - 1, [&](const Op& op) { return !from_attention(op); });
            for (int piece = 0; piece < pieces; ++piece) post(piece, from_attention), end_batch();
            i = end;
        }
    }
    return cut;
}
