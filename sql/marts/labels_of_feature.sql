-- Every label of a feature: who gave it, its score, and which one the pages show as the feature's name.
--
-- Grain:   one row per label of the feature; the one that is shown comes first, then by score, label and source.
-- Reads:   stg_labels
-- Units:   source is own for labels that people wrote, rules for `saeflow explain` without a language model, or names
--          the tool that the label was imported from. score is 0 to 1: how well the label fits, as its source measured
--          it (null if nobody did). is_name: a person's own label is shown first, then the one with the best score.
-- Parameters: feature bigint
-- Ask it:  what is feature 12 said to mean, by whom, and how well does it fit?  from labels_of_feature(12)
create or replace macro labels_of_feature(feature) as table
select
    labels.label,
    labels.source,
    labels.score,
    row_number() over (
        order by labels.source = 'own' desc, labels.score desc nulls last, labels.label, labels.source
    ) = 1 as is_name
from stg_labels as labels
where labels.feature_id = feature
order by is_name desc, labels.score desc nulls last, labels.label, labels.source;
