-- How much the model's predictions change when this feature is changed, on average over its firings.
--
-- Grain:   one row per measurement and number of tokens ahead, in that order. No rows before `saeflow effects` has run.
-- Reads:   feature_effects
-- Units:   those of feature_effects: ahead 0 is the prediction at the changed token. Changes of the loss and KL
--          divergence are means over firings, in nats, with 95% intervals by document (null for one document).
--          worse_share is the share of firings at which the loss grew.
-- Parameters: feature bigint
-- Ask it:  does the model use feature 12?  from measured_effects(12)
create or replace macro measured_effects(feature) as table
select
    effect,
    change,
    ahead,
    n_firings,
    mean_loss_change,
    loss_change_low,
    loss_change_high,
    worse_share,
    mean_kl,
    kl_low,
    kl_high
from feature_effects as effects
where effects.feature_id = feature
order by effect, ahead;
