// `eval`: mean loss and perplexity of a checkpoint on token files.
#pragma once

#include <cmath>
#include <cstdio>

#include "llmc/commands/model_file.h"
#include "llmc/data/tokenizer.h"
#include "llmc/parallel/run.h"
#include "llmc/parallel/team.h"

inline int eval_command(const Config& c, Team& team) {
    const ModelFile file(c, team.processes());
    std::optional<Loader> loader;
    team.processes().together([&] {
        check_memory(c, memory_plans(file.options(0)), 0,
                     [](int64_t) { return std::string("try smaller --chunk-tokens or --head-chunk"); });
        const Tokenizer tokenizer(file.tokenizer_name());
        loader.emplace(open_token_files(c.data.train), loader_options(c, file.model(), tokenizer, 0));
    });
    return team.run(int(c.parallel.ranks), double(c.parallel.hang_timeout), [&](Transport& transport) {
        Rank rank(file.options(transport.rank), transport);
        transport.together([&] { file.load(rank); });
        const Evaluation result = evaluate(rank, *loader, file.batch_tokens(), c.run.val_tokens);
        if (transport.rank == 0)
            std::printf("checkpoint %s\ntargets %lld\nloss %.6f nats\nperplexity %.4f\n", file.directory().c_str(),
                        static_cast<long long>(result.targets), result.loss, std::exp(result.loss));
        return 0;
    });
}
