-- The classes of tokens that a feature tells from the rest.
--
-- Grain:   one row per annotation and class. Best AUROC first; AUROC below 0.5 means that the feature avoids the class.
-- Reads:   stg_feature_classes
-- Units:   as in feature_classes.
-- Parameters: feature bigint, n bigint = 20
-- Ask it:  what does feature 12 mark?  from classes_of_feature(12)
create or replace macro classes_of_feature(feature, n := 20) as table
select
    scores.annotation,
    scores.class,
    scores.auroc,
    scores.auroc_low,
    scores.auroc_high,
    scores.average_precision,
    scores.f1,
    scores.threshold,
    scores.precision,
    scores.recall,
    scores.lift,
    scores.correlation,
    scores.q,
    scores.n_fires,
    scores.n_both
from stg_feature_classes as scores
where scores.feature_id = feature
order by scores.auroc desc nulls last, scores.annotation, scores.class
limit n;
