-- How the autoencoder learned: the log of its training.
--
-- Grain:   one row per logged step, in order; evenly spaced ones and the last if more than n were logged. None for an
--          autoencoder from elsewhere.
-- Reads:   stg_training_log
-- Units:   n_tokens is the number of tokens trained on after the step, if all batches before were as large as the
--          first. variance_unexplained, l0 and loss are those of the step's batch; dead is the number of features that
--          have not fired for train.dead_after_tokens. lr is the learning rate. Measures that the training does not
--          have are null.
-- Parameters: n bigint = 1000
-- Ask it:  had the loss come to rest when training ended?  from training_curve()
create or replace macro training_curve(n := 1000) as table
select
    step,
    n_tokens,
    variance_unexplained,
    l0,
    loss,
    dead,
    lr,
    auxiliary_loss,
    sparsity_loss,
    k,
    sparsity_factor,
    grad_norm
from (
    select
        *,
        step * first_value(batch_rows) over steps + batch_rows          as n_tokens,
        row_number() over steps - 1                                     as place,
        count(*) over (order by step rows between unbounded preceding and unbounded following) as n_logged
    from stg_training_log
    where step is not null
    window steps as (order by step)
)
where place % greatest(1, ceil(n_logged / n)::bigint) = 0 or place = n_logged - 1
order by step
limit n;
