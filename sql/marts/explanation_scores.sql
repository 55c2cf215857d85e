-- How well a label tells where its feature fires, as a language model judged it.
--
-- Grain:   one row per label's feature and source, judging model, method and stratum. By feature, source, model, method
--          and stratum; the whole in front of its strata.
-- Reads:   stg_explanation_scores
-- Units:   detection asks whether a context contains the feature, fuzzing whether the marked tokens are the right ones:
--          score is a balanced accuracy (0 to 1; 0.5 is chance) in the strata all, against_near_misses and
--          against_random, and the share of right answers in band_1 (strongest) and so on, near_misses and random.
--          simulation predicts each token's strength: score is a correlation (-1 to 1). low and high are a 95%
--          interval. n counts the examples that were answered (of simulation: contexts), n_unusable those whose answer
--          could not be read.
-- Ask it:  which labels of a language model are good? (stratum = 'all')
create or replace view explanation_scores as
select
    feature_id,
    stg_explanation_scores.source,
    model,
    method,
    stratum,
    score,
    low,
    high,
    n,
    n_unusable
from stg_explanation_scores
where method <> 'explanation'
order by
    feature_id,
    stg_explanation_scores.source,
    model,
    method,
    case when stratum = 'all' then 0 when stratum = 'firing' or stratum like 'against%' then 1 else 2 end,
    length(stratum),
    stratum;
