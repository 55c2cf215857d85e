-- The best simple rule for where each feature fires, and how well it does on held-out tokens.
--
-- Grain:   one row per feature that `saeflow explain` has explained, by feature.
-- Reads:   stg_rules
-- Units:   a rule says at which tokens the feature fires (its value is above zero). precision is the share of the
--          rule's tokens at which it fires, recall the rule's share of the tokens at which it fires, f1 their harmonic
--          mean. They count all held-out tokens that were encoded. f1 is null if the feature fires at none of them,
--          precision is null if the rule holds at none. A rule with f1 below 0.5 explains little: the feature's label
--          then says `no simple rule`. Text of the corpus stands in double quotes. kind names the kinds of rules that
--          are joined.
-- Ask it:  which features are explained by a simple rule (f1 >= 0.8)?
create or replace view feature_rules as
select feature_id, rule, kind, "precision", recall, f1
from stg_rules
order by feature_id;
