-- How well a label tells where its feature fires, as a language model judged it.
--
-- Grain:   one row per label's feature and source, judging model, method and stratum.
-- Reads:   src_explanation_scores
-- Units:   those of the mart explanation_scores. Rows of the method explanation say that a feature is finished.
-- Ask it:  select count(*) from stg_explanation_scores
create or replace view stg_explanation_scores as
select
    feature_id,
    src_explanation_scores.source,
    model,
    method,
    stratum,
    score,
    low,
    high,
    n,
    n_unusable
from src_explanation_scores;
