-- How many standard errors the ends of a 95% interval are away, if the error was estimated from n documents.
--
-- Grain:   scalar.
-- Reads:   nothing
-- Units:   Student's t with n - 1 degrees of freedom, to 1% (from 6 documents on by Cornish and Fisher 1937); null of a
--          single document.
-- Ask it:  select t_quantile(30)  -- 2.045162349583829
create or replace macro t_quantile(n) as
case
    when (n) = 2 then 12.706
    when (n) = 3 then 4.303
    when (n) = 4 then 3.182
    when (n) = 5 then 2.776
    when (n) > 5 then 1.96 * (1 + 1.2104 / ((n) - 1) + 1.44 / pow((n) - 1, 2))
end;
