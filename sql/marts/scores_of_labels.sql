-- How well each label of a feature tells where the feature fires, as a language model judged it.
--
-- Grain:   one row per source of the label, judging model, method and stratum. The whole of each method comes first.
-- Reads:   explanation_scores
-- Units:   those of explanation_scores: detection and fuzzing are balanced accuracies, 0.5 is chance; simulation is a
--          correlation. low and high are a 95% interval. n counts the examples that were answered, n_unusable those
--          whose answer could not be read.
-- Parameters: feature bigint
-- Ask it:  how good are the labels of feature 12?  from scores_of_labels(12)
create or replace macro scores_of_labels(feature) as table
select scores.source, method, stratum, score, low, high, n, n_unusable, model
from explanation_scores as scores
where scores.feature_id = feature
order by
    stratum <> 'all',
    scores.source,
    model,
    method,
    stratum not like 'against%',
    length(stratum),
    stratum;
