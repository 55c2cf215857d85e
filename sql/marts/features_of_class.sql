-- The features that tell a class of tokens from the rest best.
--
-- Grain:   one row per annotation and feature, at most n. Best AUROC first.
-- Reads:   stg_feature_classes, feature_names
-- Units:   as in feature_classes; label is the feature's label. Features that never fire in the class are left out.
-- Parameters: class text, annotation text = null, n bigint = 20
-- Ask it:  which features mark digits?  from features_of_class('digits', n := 5)
create or replace macro features_of_class(class, annotation := null, n := 20) as table
select
    scores.annotation,
    scores.feature_id,
    feature_names.label,
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
left join feature_names on feature_names.feature_id = scores.feature_id
where
    scores.class = class::varchar
    and (annotation::varchar is null or scores.annotation = annotation::varchar)
    and scores.n_both > 0
order by scores.auroc desc nulls last, scores.annotation, scores.feature_id
limit n;
