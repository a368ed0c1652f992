// `eval`: mean loss and perplexity of a checkpoint on token files.
#pragma once

#include <cmath>
#include <cstdio>

#include "llmc/commands/model_file.h"
#include "llmc/data/tokenizer.h"
#include "llmc/pipeline/run.h"

inline int eval_command(const Config& c) {
    const ModelFile file(c);
    const Tokenizer tokenizer(file.tokenizer_name());
    Rank rank(file.rank_options());
    file.load(rank);
    const int64_t context = rank.options.model.context;
    const LoaderOptions options{c.data.packing == "documents" ? Packing::documents : Packing::contiguous,
                                context,
                                rank.options.model.vocab,
                                tokenizer.end_of_text(),
                                0,
                                true};
    const Loader loader(open_token_files(c.data.train), options);
    const Evaluation result =
        evaluate(rank, loader, c.data.batch_tokens ? c.data.batch_tokens : 8 * context, c.run.val_tokens);
    std::printf("checkpoint %s\ntargets %lld\nloss %.6f nats\nperplexity %.4f\n", file.directory().c_str(),
                static_cast<long long>(result.targets), result.loss, std::exp(result.loss));
    return 0;
}
