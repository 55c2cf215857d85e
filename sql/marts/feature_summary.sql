-- How often and how strongly each feature fires.
--
-- Grain:   one row per feature, by feature_id, dead ones too.
-- Reads:   stg_feature_stats, stg_size, feature_names
-- Units:   density is a share of the encoded tokens (0 to 1). mean_value, std_value and max_value are in the units of
--          the activations, over the tokens at which the feature fires (null for dead features). In a signed run
--          max_value is the strongest value with its sign. label is the feature's best label.
-- Ask it:  which features are dense (density > 0.1) or nearly dead (n_tokens < 10)?
create or replace view feature_summary as
select
    feature_id,
    feature_names.label,
    n_tokens,
    n_tokens / nullif(n_encoded_tokens, 0)                                           as density,
    sum_value / nullif(n_tokens, 0)                                                  as mean_value,
    case
        when n_tokens > 0 then sqrt(greatest(sum_squares / n_tokens - pow(sum_value / n_tokens, 2), 0))
    end                                                                              as std_value,
    max_value
from stg_feature_stats
left join feature_names using (feature_id)
cross join stg_size
order by feature_id;
