-- Every label of a feature: who gave it, its score, and which one the pages show as the feature's name.
--
-- Grain:   one row per label of the feature, in the order of feature_labels; the first is the feature's name.
-- Reads:   stg_labels, stg_rules
-- Units:   source is own for labels that people wrote, rules for those that `saeflow explain` made without a language
--          model, or names the tool that the label comes from. score is 0 to 1: how well the label fits, as its source
--          measured it (null if nobody did); that of a rule is its F1 on held-out tokens, with precision and recall
--          beside it. is_name: a person's own label comes first, then the best score of other sources, then a rule.
-- Parameters: feature bigint
-- Ask it:  what is feature 12 said to mean, by whom, and how well does it fit?  from labels_of_feature(12)
create or replace macro labels_of_feature(feature) as table
select
    labels.label,
    labels.source,
    labels.score,
    rules.precision,
    rules.recall,
    row_number() over (
        order by
            labels.source = 'own' desc, labels.source = 'rules', labels.score desc nulls last,
            labels.label, labels.source
    ) = 1 as is_name
from stg_labels as labels
left join stg_rules as rules on labels.source = 'rules' and rules.feature_id = labels.feature_id
where labels.feature_id = feature
order by
    labels.source = 'own' desc, labels.source = 'rules', labels.score desc nulls last,
            labels.label, labels.source;
