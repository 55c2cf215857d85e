-- Each feature against each class, as the newest `saeflow probe` of each annotation found it.
--
-- Grain:   one row per annotation, class and feature that fires.
-- Reads:   src_feature_classes
-- Units:   see feature_classes. A class that the newest probe was not asked for is that of an earlier probe of the same
--          values.
-- Ask it:  how well does feature 12 tell digits from other tokens?
create or replace view stg_feature_classes as
select
    scores.annotation,
    scores.class,
    feature_id,
    n_fires,
    n_both,
    auroc,
    auroc_low,
    auroc_high,
    average_precision,
    f1,
    f1_low,
    f1_high,
    threshold,
    precision,
    recall,
    lift,
    correlation,
    t,
    p,
    q
from src_feature_classes as scores;
