-- How much the model's predictions change when a feature is changed, on average over its firings.
--
-- Grain:   one row per (effect, feature, ahead). No rows before `saeflow effects` has run.
-- Reads:   stg_effects
-- Units:   effect is the name of the measurement, change what was done to the feature: zero, mean, max*2, same, or a
--          number. ahead 0 is the prediction at the changed token, 1 that of the token after it. Changes of loss and
--          KL divergence (before ‖ after) are means over firings, in nats. low and high are the ends of a 95% interval
--          by document (1.96 cluster-robust standard errors; null for one document), as tokens of a document are alike.
--          worse_share is the share of firings at which the loss grew. n_losses counts those with a next token.
-- Ask it:  which features does the model use most? (ahead = 0, by mean_kl)
create or replace view feature_effects as
with of_documents as (
    select
        effect,
        feature_id,
        ahead,
        document_id,
        any_value(change)                            as change,
        count(*)                                     as n,
        count(loss_change)                           as n_with_loss,
        coalesce(sum(loss_change::double), 0)        as sum_loss,
        sum(kl::double)                              as sum_kl,
        count(*) filter (where loss_change > 0)      as n_worse
    from stg_effects
    group by effect, feature_id, ahead, document_id
),
means as (
    select
        effect,
        feature_id,
        ahead,
        sum(n)::bigint                               as n_firings,
        sum(n_with_loss)::bigint                     as n_losses,
        count(*)                                     as n_documents,
        count(*) filter (where n_with_loss > 0)      as n_loss_documents,
        sum(sum_loss) / nullif(sum(n_with_loss), 0)  as mean_loss_change,
        sum(sum_kl) / sum(n)                         as mean_kl,
        sum(n_worse) / nullif(sum(n_with_loss), 0)   as worse_share
    from of_documents
    group by effect, feature_id, ahead
),
errors as (
    select
        effect,
        feature_id,
        ahead,
        any_value(change)                            as change,
        1.96 * sqrt(
            any_value(n_loss_documents) / nullif(any_value(n_loss_documents) - 1, 0)
            * sum(pow(sum_loss - mean_loss_change * n_with_loss, 2))
        ) / nullif(any_value(n_losses), 0)           as loss_error,
        1.96 * sqrt(
            any_value(n_documents) / nullif(any_value(n_documents) - 1, 0) * sum(pow(sum_kl - mean_kl * n, 2))
        ) / any_value(n_firings)                     as kl_error
    from of_documents
    join means using (effect, feature_id, ahead)
    group by effect, feature_id, ahead
)
select
    effect,
    errors.change,
    feature_id,
    ahead,
    n_firings,
    n_losses,
    n_documents,
    mean_loss_change,
    mean_loss_change - loss_error as loss_change_low,
    mean_loss_change + loss_error as loss_change_high,
    worse_share,
    mean_kl,
    mean_kl - kl_error            as kl_low,
    mean_kl + kl_error            as kl_high
from means
join errors using (effect, feature_id, ahead)
order by effect, feature_id, ahead;
